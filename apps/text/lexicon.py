"""A lexicon learned from pairs of texts, and how a decoder looks words up in it.

How likely a target token is given a source token is learned by counting (IBM model 1), before any training. The decoder
attends to source tokens, and the log of the probability that the lexicon gives their translations is added to its
logits. So it learns what is likely here, among what is possible.

Half precision: probabilities, attention and logarithms are float32; token ids are integers.

Sources: Brown et al. 1993, J93-2003 (model 1); Arthur, Neubig and Nakamura 2016, "Incorporating discrete translation
lexicons into neural machine translation", arXiv:1606.02006 (the lexicon as a bias).
"""

from collections.abc import Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from apps.text import pieces

_ITERATIONS = 5
_FLOOR = 1e-3  # probability of what the lexicon doesn't know; not tuned


# Counting


class Numbered(NamedTuple):
    """Texts as numbers of words.

    Attributes:
        words: int64 `[places]`, 0 in front of each text and behind it.
        starts: the place of each text's first word.
        lengths: each text's words.
        size: the numbers are below it.
    """

    words: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    size: int


class Grid(NamedTuple):
    """Each word of a source with each word of its target, `[entries]`; and the different pairs of words, `[pairs]`."""

    source_places: np.ndarray
    target_places: np.ndarray
    pair: np.ndarray
    source_words: np.ndarray
    target_words: np.ndarray


def make_grid(source: Numbered, target: Numbered) -> Grid:
    """Returns all pairs that an alignment chooses from."""
    row_line = np.repeat(np.arange(len(source.lengths)), source.lengths)
    repeats = target.lengths[row_line]
    source_places = np.repeat(np.flatnonzero(source.words).astype("int32"), repeats)
    first = target.starts[row_line] - (np.cumsum(repeats) - repeats)
    target_places = (np.repeat(first, repeats) + np.arange(len(source_places))).astype("int32")
    keys = source.words[source_places] * target.size + target.words[target_places]
    keys, pair = np.unique(keys, return_inverse=True)
    return Grid(source_places, target_places, pair.astype("int32"), *np.divmod(keys, target.size))


def ibm_model_1(words: np.ndarray, places: np.ndarray, pair: np.ndarray, given: np.ndarray):
    """Returns how likely each pair's word is given its other word, float64 `[pairs]`, and given none, `[words]`.

    Args:
        words: the words to explain, `[places]`.
        places: their places in the grid, `[entries]`.
        pair: of the grid.
        given: the other words, `[pairs]`.
    """
    is_word = words > 0
    likely, alone = np.full(len(given), 1.0), np.full(words.max() + 1, 1.0)
    for _ in range(_ITERATIONS):
        each = likely[pair]
        by_none = np.where(is_word, alone[words], 0.0)
        total = np.where(is_word, np.bincount(places, each, minlength=len(words)) + by_none, 1.0)
        counts = np.bincount(pair, each / total[places])
        likely = counts / np.bincount(given, counts)[given]
        alone = np.bincount(words, by_none / total)
        alone /= alone.sum()
    return likely, alone


# Looking up


class Lexicon(tf.Module):
    """The likeliest translations of each token.

    Args:
        translations: ids of target tokens, int `[source size, kept]`, PAD where there are fewer.
        probabilities: how likely each is, given the source token, `[source size, kept]`.
        size: ids of target tokens.
    """

    def __init__(self, translations: np.ndarray, probabilities: np.ndarray, size: int):
        super().__init__()
        self.size = size
        self.translations = tf.Variable(translations, trainable=False, dtype=tf.int32, name="translations")
        self.probabilities = tf.Variable(probabilities, trainable=False, dtype=tf.float32, name="probabilities")


def learn(
    source: tf.RaggedTensor, target: tf.RaggedTensor, sizes: Sequence[int], kept: int, most_pairs: int = 30_000
) -> Lexicon:
    """Counts which tokens of a target stand for which of its source, END in both.

    Args:
        source: token ids, int32 `[texts, None]`, none of them PAD.
        target: of the same texts.
        sizes: ids there are of source tokens, and of target tokens.
        kept: translations of each token, 1 or more.
        most_pairs: of more texts some are left out: each has some thousand entries, and all are in memory.
    """
    step = -(-int(source.nrows()) // most_pairs)
    numbered = [_numbered(side[::step], size) for side, size in zip((source, target), sizes, strict=True)]
    grid = make_grid(*numbered)
    likely, _ = ibm_model_1(numbered[1].words, grid.target_places, grid.pair, grid.source_words)
    order = np.lexsort([-likely, grid.source_words])
    words = grid.source_words[order]
    rank = np.arange(len(words)) - np.searchsorted(words, words)
    best = rank < kept
    translations, probabilities = np.full([sizes[0], kept], pieces.PAD), np.zeros([sizes[0], kept])
    translations[words[best], rank[best]] = grid.target_words[order[best]]
    probabilities[words[best], rank[best]] = likely[order[best]]
    return Lexicon(translations, probabilities, sizes[1])


def _numbered(rows: tf.RaggedTensor, size: int) -> Numbered:
    ends = tf.tile(tf.constant([[pieces.END, 0]]), [rows.nrows(), 1])
    words = np.concatenate([[0], tf.concat([rows, ends], axis=1).values.numpy()]).astype("int64")
    lengths = rows.row_lengths().numpy() + 1
    return Numbered(words, np.cumsum(lengths + 1) - lengths, lengths, size)


class LexiconLogits(keras.layers.Layer):
    """Log-probabilities of the next token by the lexicon, of the source tokens that the decoder attends to.

    Args:
        lexicon: what is looked up.
        width: numbers that queries and keys have.
    """

    def __init__(self, lexicon: Lexicon, width: int, **settings):
        super().__init__(**settings)
        self.lexicon, self.width = lexicon, width
        # One for queries and keys, so that attention starts at what is alike: the same place of the text.
        self.projection = keras.layers.Dense(width, name="projection", dtype=self.dtype_policy)

    def call(self, x, encoded, source_ids):
        """Looks up.

        Args:
            x: the decoder's, `[batch, length, width]`.
            encoded: the encoder's, `[batch, source length, width]`.
            source_ids: int32 `[batch, source length]`.

        Returns:
            float32 `[batch, length, size]`.
        """
        return self.look_up(x, self.project(encoded), source_ids)

    def project(self, encoded):
        """Returns the keys of a source, once for all tokens that look up there: as `encoded`."""
        return self.projection(encoded)

    def look_up(self, x, keys, source_ids):
        """Does what `call` does, with keys that `project` returned."""
        query, keys = (tf.cast(tensor, tf.float32) for tensor in (self.projection(x), keys))
        scores = tf.matmul(query, keys, transpose_b=True) * self.width**-0.5
        attention = tf.nn.softmax(tf.where((source_ids != pieces.PAD)[:, tf.newaxis], scores, -1e9))
        probabilities = tf.gather(tf.convert_to_tensor(self.lexicon.probabilities), source_ids)
        shares = attention[..., tf.newaxis] * probabilities[:, tf.newaxis]  # [batch, length, source length, kept]
        # Added up for each place and token: few of all, so no matrix product.
        batch, length, size = tf.shape(x)[0], tf.shape(x)[1], self.lexicon.size
        rows = tf.reshape(tf.range(batch * length) * size, [batch, length, 1, 1])
        entries = rows + tf.gather(tf.convert_to_tensor(self.lexicon.translations), source_ids)[:, tf.newaxis]

        @tf.custom_gradient
        def add_up(shares):
            sums = tf.math.unsorted_segment_sum(shares, entries, batch * length * size) + _FLOOR

            def gradient(upstream):  # only where there are shares: an array of all divisions is many times as large
                return tf.gather(upstream, entries) / tf.gather(sums, entries)

            return tf.math.log(sums), gradient

        return tf.reshape(add_up(shares), [batch, length, size])

    def compute_output_spec(self, x, encoded, source_ids):
        """Returns the form of the result."""
        return keras.KerasTensor([*x.shape[:2], self.lexicon.size], "float32")
