"""The characters that a recogniser writes: which there are, texts to labels, labels to texts inside the graph.

Of a text count its letters, in lower case and with their accents, digits, apostrophes, and where words end; marks
don't. Labels are the letters and the apostrophe that training texts have often enough, and the space. A digit is never
one of them: what it stands for was said in letters that nobody wrote down.

Who speaks a text pauses at its marks: for synthesis `MARK` stands for a space that has marks beside it, so that a text
has as many labels with it as without.
"""

import collections
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf

_APOSTROPHES = str.maketrans("\u2019\u02bc\u2018\u00b4`", "'''''")
MARK = ","
_PAUSES = ".,;:!?\u2026\u2013\u2014\u037e"
_DASH = r"[ \t\n]-+[ \t\n]"  # a hyphen that stands alone
_AROUND_MARK = f" ?{MARK}[ {MARK}]*"
_RARE = 10  # times that a character is in the training texts, below which it isn't learned; not tuned


def normalize(text: str, with_marks: bool = False) -> str:
    """Returns what counts of a text.

    Args:
        text: as people write it.
        with_marks: write `MARK` for a space that has marks beside it, and not a space.

    Example:
        >>> normalize("No\u2026 Vidíš, jsi VENKU -- 2x!")
        'no vidíš jsi venku 2x'
        >>> normalize("No\u2026 Vidíš, jsi VENKU -- 2x!", with_marks=True)
        'no,vidíš,jsi venku,2x'
    """
    text = unicodedata.normalize("NFC", text.lower().translate(_APOSTROPHES))
    kept = "".join(_kept(each, with_marks) for each in re.sub(_DASH, f" {MARK} ", text))
    spaced = " ".join(re.sub(r"(?<!\w)'(?!\w)", " ", kept).split())  # an apostrophe is beside a letter
    return re.sub(_AROUND_MARK, MARK, spaced).strip(MARK)


def _kept(character: str, with_marks: bool) -> str:
    if unicodedata.category(character)[0] in "LMN" or character == "'":
        return character
    return MARK if with_marks and character in _PAUSES else " "


class Alphabet(tf.Module):
    """Characters and their labels, from 1 on.

    Args:
        characters: each once. With `MARK` among them texts are normalised with marks.
    """

    def __init__(self, characters: Sequence[str]):
        super().__init__()
        self.characters = list(characters)
        self._labels = {character: label for label, character in enumerate(self.characters, 1)}

    def encode(self, text: str) -> np.ndarray:
        """Returns the labels of a normalised text, int32 `[labels]`, without characters that there aren't."""
        return np.array([self._labels[each] for each in text if each in self._labels], np.int32)

    def tokenize(self, text: tf.Tensor) -> tf.RaggedTensor:
        """Returns int32 `[batch, None]` of texts as people write them, string `[batch]`: normalised and encoded.

        In plain TensorFlow operations, for serving. Of a letter and accents that are written one by one only those
        that the alphabet has as one are put together.
        """
        text = tf.strings.lower(tf.strings.unicode_transcode(text, "UTF-8", "UTF-8"), "utf-8")
        text = tf.strings.regex_replace(text, f"[{''.join(map(chr, _APOSTROPHES))}]", "'")
        for character in self.characters:
            if (apart := unicodedata.normalize("NFD", character)) != character:
                text = tf.strings.regex_replace(text, apart, character)
        mark = MARK if MARK in self.characters else " "
        # An apostrophe beside a letter is set aside while the others go.
        for pattern, replacement in (
            (_DASH, f" {mark} "),
            (f"[{_PAUSES}]", mark),
            (rf"[^\pL\pM\pN'{mark}]", " "),
            (r"([\pL\pN])'", r"\1_"),
            (r"'([\pL\pN])", r"_\1"),
            ("'", " "),
            ("_", "'"),
            (" +", " "),
            (_AROUND_MARK, MARK),
            (f"^[ {MARK}]+|[ {MARK}]+$", ""),
        ):
            text = tf.strings.regex_replace(text, pattern, replacement)
        points = tf.strings.unicode_decode(text, "UTF-8")
        known = tf.constant([ord(character) for character in self.characters])
        same = tf.cast(points.values[:, tf.newaxis] == known, tf.int32)
        labels = tf.reduce_sum(same * (1 + tf.range(tf.size(known))), axis=1)
        return tf.ragged.boolean_mask(points.with_values(labels), points.with_values(labels > 0))

    def decode(self, labels: tf.Tensor) -> tf.Tensor:
        """Returns normalised texts, string `[batch]`, of labels int32 `[batch, longest]`, 0 behind a text's last."""
        texts = tf.strings.reduce_join(tf.gather(["", *self.characters], labels), axis=1)
        return tf.strings.strip(tf.strings.regex_replace(texts, " +", " "))


def learn(texts: Iterable[str]) -> tuple[Alphabet, dict[str, int]]:
    """Returns the alphabet of normalised training texts, and how often each character is there that it lacks."""
    counts = collections.Counter("".join(texts))
    kept = {each for each, count in counts.items() if each.isspace() or (count >= _RARE and not each.isnumeric())}
    left_out = {each: count for each, count in counts.most_common() if each not in kept}
    return Alphabet(sorted(kept | {" "})), left_out
