"""Sub-words: a vocabulary that sentencepiece trains, and its tokens by plain TensorFlow operations.

sentencepiece's unigram model gives each piece a score (a log-probability); a word's tokens are the pieces that spell it
and whose scores add up to the most. `tokenize` finds them in a graph, so that an exported model takes texts and needs
neither sentencepiece nor TensorFlow Text. Its ids are sentencepiece's own (`encode`) for every text, because both read
what `normalize` made of it, go word by word (a sum over a whole sentence would round differently) and add float32
scores in one order. A character that no piece has is spelled in bytes: nothing is unknown, nothing is lost.

It does not change characters other than spaces and case: é may be one character or two, and the two differ.

Sources: Kudo 2018, arXiv:1804.10959 (unigram model); `Model::EncodeOptimized`, which sums in float32 since 0.2.2,
https://github.com/google/sentencepiece/blob/f5c736302c2d909216a759fd15a4f9141acfd74c/src/unigram_model.cc
"""

import functools
import io
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece
import tensorflow as tf
from google.protobuf import message
from sentencepiece import sentencepiece_model_pb2

PAD, UNKNOWN, START, END = 0, 1, 2, 3

# sentencepiece's mark of a space, and what a text has in its place.
_SPACE, _INSTEAD = "\u2581", "_"
# The trainer's own mark of rare characters: it leaves out a text that has it.
_RARE = "\u2585", _INSTEAD
# A longer word is cut: no natural one is, and a word's length bounds the work of a batch.
_LONGEST_WORD = 64
# kUnkPenalty: so much worse than the worst piece is a character that no piece has.
_PENALTY = np.float32(10)
# Logarithms of probabilities are far above. A word's sum stays where sentencepiece adds as we do: somewhere between
# -65,536 and -131,072 it starts anew, and rounds otherwise (measured, 0.2.3).
_LEAST = -500
# Training goes on with [PAD], [UNKNOWN], [START], [END] and the 256 bytes before the first piece.
_RESERVED = 4 + 256
# sentencepiece's default: so many of the characters of the training texts become pieces, the rest is bytes.
_COVERAGE = 0.9995
_CHUNK = 1024


def train(texts: Iterable[str | bytes], size: int, lowercase: bool = False) -> "Vocabulary":
    """Finds the pieces that spell `texts` best; the same texts give the same vocabulary, byte by byte.

    Args:
        texts: to learn from; UTF-8 where bytes.
        size: ids wanted, with 4 special ones and 256 bytes; fewer where the texts don't have so many pieces.
        lowercase: whether capitals are made small, here and in every text to come.

    Raises:
        ValueError: there is no text, or `size` has no room for the characters of the texts.
    """
    if size <= _RESERVED:
        raise ValueError(f"size is {size}, and {_RESERVED} ids are special or bytes: give more, e.g. 8,000")
    lines = (line.decode().replace(*_RARE) for line in _normalized(texts, lowercase) if line)
    first = next(lines, None)
    if first is None:
        raise ValueError("texts has no text other than spaces: there is nothing to learn pieces from")
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=written,
            model_type="unigram",
            vocab_size=size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=_COVERAGE,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=2**30,  # bytes; a longer text would be left out silently
            pad_id=PAD,
            unk_id=UNKNOWN,
            bos_id=START,
            eos_id=END,
            num_threads=1,  # the sums' order, and with it the last bits of the scores
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"sentencepiece can't learn {size} pieces from texts: {error}") from error
    return Vocabulary(written.getvalue(), lowercase)


class Vocabulary(tf.Module):
    """Pieces with their scores; makes tokens of texts and texts of tokens.

    Args:
        model: a sentencepiece model, serialized, as `train` makes it.
        lowercase: whether capitals are made small.

    Attributes:
        size: number of ids.

    Raises:
        ValueError: `model` is none of `train`'s.

    Example:
        >>> vocabulary = train(["low lower lowest", "new newer newest"], size=300)
        >>> token_ids = vocabulary.tokenize(tf.constant(["the newest"]))
        >>> vocabulary.detokenize(token_ids).numpy().tolist()
        [b'the newest']
    """

    def __init__(self, model: bytes, lowercase: bool):
        super().__init__()
        self.model, self.lowercase = model, lowercase
        parsed = _parse(model)
        self.size = len(parsed.pieces)
        kind = sentencepiece_model_pb2.ModelProto.SentencePiece
        scores = np.full(self.size, -np.inf, "float32")
        surfaces = [b""] * self.size
        surfaces[UNKNOWN] = " \u2047 ".encode()  # as sentencepiece writes it
        byte_ids, normal = np.zeros(256, "int32"), []
        for index, piece in enumerate(parsed.pieces):
            if piece.type == kind.NORMAL:
                normal.append(index)
                scores[index] = piece.score
                surfaces[index] = piece.piece.encode()
            elif piece.type == kind.BYTE:
                value = int(piece.piece[1:-1], 16)
                byte_ids[value], surfaces[index] = index, bytes([value])
        spelled = [parsed.pieces[index].piece for index in normal]
        self._longest = max(map(len, spelled))
        self._unknown_score = scores[normal].min() - _PENALTY
        self._scores, self._byte_ids = tf.constant(scores), tf.constant(byte_ids)
        self._surfaces = tf.constant(surfaces)
        self._ids = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(tf.constant(spelled), tf.constant(normal, tf.int32)), UNKNOWN
        )
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._encode_word = functools.lru_cache(maxsize=2**18)(lambda word: processor.encode(word.decode()))

    def normalize(self, texts: tf.Tensor) -> tf.Tensor:
        """Returns the texts, string `[...]`, that the vocabulary sees: one space between words, valid UTF-8."""
        return _normalize(texts, self.lowercase)

    def encode(self, texts: Iterable[str | bytes]) -> list[np.ndarray]:
        """Returns each text's ids, int32, by sentencepiece itself; without START and END."""
        lines = (map(self._encode_word, line.split()) for line in _normalized(texts, self.lowercase))
        return [np.fromiter(itertools.chain.from_iterable(line), "int32") for line in lines]

    def tokenize(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Returns each text's ids, int32 `[batch, None]`, for string `[batch]`; without START and END."""
        with tf.device("CPU"):  # no GPU has strings, and the loops are many small operations
            words = tf.strings.split(tf.reshape(self.normalize(texts), [-1]))
            different, index = tf.unique(words.values, out_idx=tf.int64)
            token_ids = self._segment(tf.strings.join([_SPACE, different]))
            return words.with_values(tf.gather(token_ids, index)).merge_dims(1, 2)

    def detokenize(self, token_ids: tf.RaggedTensor) -> tf.Tensor:
        """Returns the texts, string `[batch]`, of int `[batch, None]`; bytes that aren't UTF-8 become U+FFFD."""
        with tf.device("CPU"):
            texts = _valid(tf.strings.reduce_join(tf.gather(self._surfaces, token_ids), axis=-1))
            return tf.strings.regex_replace(tf.strings.regex_replace(texts, _SPACE, " "), "^ ", "")

    def _segment(self, words: tf.Tensor) -> tf.RaggedTensor:
        """Returns the ids, int32 `[words, None]`, of different words that begin with sentencepiece's space."""
        letters = tf.strings.unicode_split(words, "UTF-8")  # [words, None]; below, flat: all words' in a row
        starts, ends = letters.row_starts(), letters.row_limits()
        num = tf.size(letters.values, tf.int64)
        lengths = tf.range(self._longest, 0, -1, tf.int64)
        found = self._pieces_ending(letters.values)
        scores = tf.gather(self._scores, found)
        single = tf.where(found[:, -1] == UNKNOWN, self._unknown_score, scores[:, -1])
        scores = tf.concat([scores[:, :-1], single[:, tf.newaxis]], axis=1)

        # best[word, i]: of spelling the word up to lengths[i] letters before its next one.
        def forward(position, best, chosen):
            totals = best + tf.gather(scores, tf.minimum(starts + position, num - 1))
            top = tf.reduce_max(totals, axis=1, keepdims=True)
            # Of equals the longest: sentencepiece goes by starts, and only more replaces what it has.
            length = tf.reduce_max(tf.where(totals == top, lengths, 0), axis=1)
            chosen = chosen.write(tf.cast(position, tf.int32), length)
            return position + 1, tf.concat([best[:, 1:], top], axis=1), chosen

        longest_word = tf.reduce_max(tf.concat([[1], ends - starts], axis=0))  # 1: an empty array can't be stacked
        before = tf.fill([tf.size(words), self._longest - 1], -np.inf)
        best = tf.concat([before, tf.zeros([tf.size(words), 1])], axis=1)
        chosen = tf.TensorArray(tf.int64, tf.cast(longest_word, tf.int32), element_shape=[None])
        going = (tf.zeros([], tf.int64), best, chosen)
        shapes = (tf.TensorShape([]), tf.TensorShape([None, self._longest]), tf.TensorShape(None))
        *_, chosen = tf.while_loop(lambda position, *_: position < longest_word, forward, going, shapes)
        chosen = tf.RaggedTensor.from_tensor(tf.transpose(chosen.stack()), lengths=ends - starts).values
        token_ids = tf.gather(found, self._longest - chosen, axis=1, batch_dims=1)

        # is_end[i]: whether a piece of a word's best spelling ends before letter i; at the words' starts in any case.
        behind = tf.concat([[0], chosen], axis=0)

        def backward(ends, is_end):
            is_end = tf.tensor_scatter_nd_update(is_end, ends[:, tf.newaxis], tf.ones_like(ends, tf.bool))
            return tf.maximum(ends - tf.gather(behind, ends), starts), is_end

        going = (ends, tf.zeros([num + 1], tf.bool))
        _, is_end = tf.while_loop(lambda ends, _: tf.reduce_any(ends > starts), backward, going)

        # Of each letter: the piece that ends there, or the bytes of a letter that no piece has, or nothing.
        known = is_end[1:] & (token_ids != UNKNOWN)
        spelled = tf.strings.bytes_split(tf.where(is_end[1:] & ~known, letters.values, ""))
        values = tf.cast(tf.reshape(tf.io.decode_raw(spelled.values, tf.uint8), [-1]), tf.int32)
        pieces = tf.RaggedTensor.from_row_lengths(token_ids[known], tf.cast(known, tf.int64))
        both = tf.concat([pieces, spelled.with_values(tf.gather(self._byte_ids, values))], axis=1)
        return letters.with_values(both).merge_dims(1, 2)

    def _pieces_ending(self, letters: tf.Tensor) -> tf.Tensor:
        """Returns the pieces that end at each letter, int32 `[letters, longest]`, the longest first; or UNKNOWN.

        A piece has sentencepiece's space in front or not at all: none reaches from a word into the next.
        """
        found, text = [], letters
        for _ in range(self._longest):
            found.append(self._ids.lookup(text))
            text = tf.strings.join([tf.concat([[" "], text], axis=0)[:-1], letters])
        return tf.stack(found[::-1], axis=1)


def _parse(model: bytes) -> sentencepiece_model_pb2.ModelProto:
    """Returns the model's message, if it says what the graph does."""
    try:
        parsed = sentencepiece_model_pb2.ModelProto.FromString(model)
    except message.DecodeError as error:
        raise ValueError(f"model is no serialized sentencepiece model: {error}") from error
    trainer, normalizer = parsed.trainer_spec, parsed.normalizer_spec
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    right = {
        "model_type is unigram": trainer.model_type == trainer.UNIGRAM,
        "ids of PAD, UNKNOWN, START, END": (trainer.pad_id, trainer.unk_id, trainer.bos_id, trainer.eos_id)
        == (PAD, UNKNOWN, START, END),
        "byte_fallback": sum(piece.type == kinds.BYTE for piece in parsed.pieces) == 256,
        "pieces are control, unknown, byte or normal ones": all(
            piece.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE, kinds.NORMAL) for piece in parsed.pieces
        ),
        f"scores are between {_LEAST} and 0": all(_LEAST < piece.score <= 0 for piece in parsed.pieces),
        "there are normal pieces": any(piece.type == kinds.NORMAL for piece in parsed.pieces),
        "no piece has a space but in front": not any(_SPACE in piece.piece[1:] for piece in parsed.pieces),
        "normalization is identity": not normalizer.precompiled_charsmap and not normalizer.normalization_rule_tsv,
        "add_dummy_prefix": normalizer.add_dummy_prefix and not trainer.treat_whitespace_as_suffix,
        "escape_whitespaces": normalizer.escape_whitespaces,
    }
    if wrong := [what for what, holds in right.items() if not holds]:
        raise ValueError(f"model is a sentencepiece model, but not as train makes them: not so: {'; '.join(wrong)}")
    return parsed


def _normalize(texts: tf.Tensor, lowercase: bool) -> tf.Tensor:
    texts = tf.strings.regex_replace(_valid(texts), r"[\s\p{Z}\p{Cc}]+", " ")
    texts = tf.strings.regex_replace(texts, _SPACE, _INSTEAD)
    if lowercase:
        texts = tf.strings.lower(texts, encoding="utf-8")
    texts = tf.strings.regex_replace(texts, f"[^ ]{{{_LONGEST_WORD}}}", r"\0 ")
    return tf.strings.strip(tf.strings.regex_replace(texts, "  ", " "))


def _valid(texts: tf.Tensor) -> tf.Tensor:
    """Returns UTF-8 where every byte that isn't became U+FFFD."""
    return tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")


def _normalized(texts: Iterable[str | bytes], lowercase: bool) -> Iterator[bytes]:
    """Yields the texts one by one, as `normalize` makes them."""
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, _CHUNK)):
        # Half of a surrogate pair can't be encoded: as bytes that aren't UTF-8 it becomes U+FFFD like others.
        lines = [line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line for line in chunk]
        yield from _normalize(tf.constant(lines, tf.string), lowercase).numpy()
