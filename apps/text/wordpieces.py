"""BERT's sub-words (WordPiece) by plain TensorFlow operations, for KerasHub's BERT, DistilBERT and ELECTRA.

A text is split at spaces and control characters, and around punctuation and Chinese characters; a word's first token is
the longest piece that it begins with, and so on for the rest with pieces that begin with ##. A word that this can't
spell, or one of more than 100 bytes, is [UNK]. The ids are those of `keras_hub.tokenizers.BertTokenizer`, which needs
TensorFlow Text's own operations, and these aren't in every server.

It differs from KerasHub in four things. With `lowercase` but not `strip_accents` KerasHub also composes a letter that
has three accents in characters of their own, or two in another order than Unicode's. Characters that Unicode got after
version 14 (2021), Python 3.11's, keep their case and accents. What isn't UTF-8 becomes U+FFFD, here a character like
others, there [UNK]. A NUL is a space, there the text ends.

Sources: Devlin et al. 2018, arXiv:1810.04805; https://github.com/google-research/bert/blob/eedf5716ce1268e56f0a50264a88cafad334ac61/tokenization.py;
keras_hub 0.32, `tokenizers/word_piece_tokenizer.py`; Unicode Standard Annex 15 (normalization).
"""

import collections
import functools
import itertools
import sys
import unicodedata
from collections.abc import Iterable

import numpy as np
import tensorflow as tf

_UNKNOWN = "[UNK]"
_INNER = "##"
_MOST_BYTES = 100
_CHUNK = 256

_SPACES = r"[\s\p{Cc}\p{Cf}]+"
_PUNCTUATION = r"!-/:-@\[-`{-~\p{P}"  # ASCII's symbols too
_CHINESE = (
    r"\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2B73F}\x{2B740}-\x{2B81F}\x{2B820}-\x{2CEAF}"
    r"\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}"
)
# Unicode's Default_Ignorable_Code_Point (DerivedCoreProperties.txt), first and last: invisible, and no small letters.
_IGNORABLE = [
    (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F),
    (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
]  # fmt: skip
# A table's answer for what isn't in it; no text has it.
_SAME = b"\xff"


class WordPieces(tf.Module):
    """BERT's vocabulary; makes tokens of texts.

    Args:
        vocabulary: pieces, their ids' order; `[UNK]` is one of them.
        lowercase: whether capitals are made small, and characters that look alike the same (NFKC_Casefold).
        strip_accents: whether letters lose their accents.

    Attributes:
        size: number of ids.

    Raises:
        ValueError: `vocabulary` has no `[UNK]`, or a piece that is empty, has a space, or comes twice.

    Example:
        >>> words = WordPieces(["[UNK]", "the", "new", "##est", "!"], lowercase=True, strip_accents=True)
        >>> words.tokenize(tf.constant(["The newest!", "no"])).to_list()
        [[1, 2, 3, 4], [0]]
    """

    def __init__(self, vocabulary: list[str], lowercase: bool, strip_accents: bool):
        super().__init__()
        self.size = len(vocabulary)
        if _UNKNOWN not in vocabulary:
            raise ValueError(f"vocabulary has no {_UNKNOWN}: words that it can't spell would have no id")
        for index, piece in enumerate(vocabulary):
            if not piece or " " in piece:
                raise ValueError(f"vocabulary has {piece!r} at {index}: no word has a space, and none is empty")
        if len(set(vocabulary)) < self.size:
            twice, _ = collections.Counter(vocabulary).most_common(1)[0]
            raise ValueError(f"vocabulary has {twice!r} twice: its id isn't clear")
        self._unknown = vocabulary.index(_UNKNOWN)
        self._longest = max(map(len, vocabulary))
        self._ids = _table(dict(zip(vocabulary, range(self.size), strict=True)), -1)
        self._bare = _table(_without_accents(), _SAME) if strip_accents else None
        self._small = _table(_small(), _SAME) if lowercase else None
        self._composed = _table(_composed(), _SAME) if lowercase else None

    def encode(self, texts: Iterable[str | bytes]) -> list[np.ndarray]:
        """Returns each text's ids, int32; without [CLS] and [SEP]."""
        texts, encoded = iter(texts), []
        while chunk := list(itertools.islice(texts, _CHUNK)):
            chunk = [text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text for text in chunk]
            token_ids = self.tokenize(tf.constant(chunk, tf.string))
            encoded += np.split(token_ids.values.numpy(), token_ids.row_splits.numpy()[1:-1])
        return encoded

    def tokenize(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Returns each text's ids, int32 `[batch, None]`, for string `[batch]`; without [CLS] and [SEP]."""
        with tf.device("CPU"):  # no GPU has strings, and the loop is many small operations
            words = self._split(tf.reshape(texts, [-1]))
            different, index = tf.unique(words.values, out_idx=tf.int64)
            token_ids = self._segment(self._fold(different))
            return words.with_values(tf.gather(token_ids, index)).merge_dims(1, 2)

    def _split(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Returns the texts' words, string `[batch, None]`."""
        texts = tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")
        if self._bare is not None:
            texts = _replaced(texts, self._bare)
        texts = tf.strings.regex_replace(texts, f"[{_PUNCTUATION}{_CHINESE}]", r" \0 ")
        return tf.strings.split(tf.strings.regex_replace(texts, _SPACES, " "))

    def _fold(self, words: tf.Tensor) -> tf.Tensor:
        """Returns small letters, each in one character where Unicode has one. A word may get a space, or empty."""
        if self._small is None:
            return words
        words = tf.strings.join([_replaced(words, self._small), " "])  # between words: no letter goes with it
        for _ in range(2):  # a letter of three characters takes two
            letters = tf.strings.unicode_split(words, "UTF-8")
            ahead = tf.concat([letters.values, [" "]], axis=0)[1:]
            whole = self._composed.lookup(tf.strings.join([letters.values, ahead]))
            found = whole != _SAME
            values = tf.where(found, whole, letters.values)
            # What became a part of the character in front is gone.
            values = tf.where(tf.concat([[False], found], axis=0)[:-1], "", values)
            words = tf.strings.reduce_join(letters.with_values(values), axis=-1)
        return tf.strings.regex_replace(words, " $", "")

    def _segment(self, words: tf.Tensor) -> tf.RaggedTensor:
        """Returns the ids, int32 `[words, None]`, of different words."""
        # A space, in no piece and so [UNK], in place of long words; and between words, for no piece to cross.
        words = tf.where(tf.strings.length(words) > _MOST_BYTES, " ", words)
        words = tf.where(words == "", "", tf.strings.join([words, " "]))
        letters = tf.strings.unicode_split(words, "UTF-8")
        starts, limits = letters.row_starts(), letters.row_limits()
        ends = tf.maximum(limits - 1, starts)
        num = tf.size(letters.values, tf.int64)
        is_first = tf.scatter_nd(starts[:, tf.newaxis], tf.cast(limits > starts, tf.int32), [num + 1])[:-1] > 0

        # Of each letter: the longest piece that begins there, and how long it is; -1 and 0 where none does.
        text = tf.strings.join([tf.where(is_first, "", _INNER), letters.values])
        ahead, token_ids, lengths = letters.values, tf.fill([num], -1), tf.zeros([num], tf.int64)
        for length in range(1, self._longest + 1):
            found = self._ids.lookup(text)
            token_ids = tf.where(found >= 0, found, token_ids)
            lengths = tf.where(found >= 0, tf.constant(length, tf.int64), lengths)
            ahead = tf.concat([ahead, [" "]], axis=0)[1:]
            text = tf.strings.join([text, ahead])

        # At most one position more than letters, where the words that are over may stand.
        lengths = tf.concat([lengths, [0]], axis=0)

        def forward(at, is_start, going):
            is_start = tf.tensor_scatter_nd_max(is_start, at[:, tf.newaxis], tf.cast(going, tf.int32))
            onward = at + tf.where(going, tf.gather(lengths, at), 0)
            return onward, is_start, (onward > at) & (onward < ends)

        going = (starts, tf.zeros([num + 1], tf.int32), starts < ends)
        at, is_start, _ = tf.while_loop(lambda *state: tf.reduce_any(state[2]), forward, going)

        failed = tf.gather(at < ends, letters.value_rowids())
        kept = tf.where(failed, is_first, is_start[:-1] > 0)
        token_ids = letters.with_values(tf.where(failed, self._unknown, token_ids))
        return tf.ragged.boolean_mask(token_ids, letters.with_values(kept))


def _table(becomes: dict, default) -> tf.lookup.StaticHashTable:
    values = tf.constant(list(becomes.values()))
    return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(tf.constant(list(becomes)), values), default)


def _replaced(texts: tf.Tensor, table: tf.lookup.StaticHashTable) -> tf.Tensor:
    """Returns the texts with each character as the table has it, or as it is."""
    letters = tf.strings.unicode_split(texts, "UTF-8")
    found = table.lookup(letters.values)
    return tf.strings.reduce_join(letters.with_values(tf.where(found == _SAME, letters.values, found)), axis=-1)


@functools.cache
def _without_accents() -> dict[str, str]:
    """Returns what becomes of each character that has accents or is one."""
    table = {}
    for letter in _characters():
        bare = "".join(part for part in _nfd(letter) if unicodedata.category(part) != "Mn")
        table |= {letter: bare} if bare != letter else {}
    return table


@functools.cache
def _small() -> dict[str, str]:
    """Returns Unicode's NFKC_Casefold of each character that isn't its own."""
    ignored = dict.fromkeys(code for low, high in _IGNORABLE for code in range(low, high + 1))
    table = {chr(code): "" for code in ignored}
    for letter in _characters():
        small = _nfkc(_nfkc(letter).casefold()).translate(ignored)
        table |= {letter: small} if small != letter else {}
    return table


@functools.cache
def _composed() -> dict[str, str]:
    """Returns the character that two are together: é of e and its accent, and so on."""
    table = {}
    for letter in _characters():
        parts = _nfd(letter)
        if parts != letter == unicodedata.normalize("NFC", letter):
            table[unicodedata.normalize("NFC", parts[:-1]) + parts[-1]] = letter
    return table


def _characters() -> list[str]:
    return [
        chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) not in ("Cn", "Co", "Cs")
    ]


_nfd = functools.partial(unicodedata.normalize, "NFD")
_nfkc = functools.partial(unicodedata.normalize, "NFKC")
