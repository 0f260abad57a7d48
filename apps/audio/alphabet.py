"""The characters that a recogniser writes: which there are, texts to labels, labels to texts inside the graph.

Of a text count its letters, in lower case and with their accents, digits, apostrophes, and where words end; marks
don't. Labels are the letters and the apostrophe that training texts have often enough, and the space. A digit is never
one of them: what it stands for was said in letters that nobody wrote down.
"""

import collections
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf

_APOSTROPHES = str.maketrans("\u2019\u02bc\u2018\u00b4`", "'''''")
_RARE = 10  # times that a character is in the training texts, below which it isn't learned; not tuned


def normalize(text: str) -> str:
    """Returns what counts of a text.

    Example:
        >>> normalize("No\u2026 Vid\u00edš, jsi VENKU -- 2x!")
        'no vidíš jsi venku 2x'
    """
    text = unicodedata.normalize("NFC", text.lower().translate(_APOSTROPHES))
    kept = "".join(each if unicodedata.category(each)[0] in "LMN" or each == "'" else " " for each in text)
    return " ".join(re.sub(r"(?<!\w)'(?!\w)", " ", kept).split())  # an apostrophe is beside a letter


class Alphabet(tf.Module):
    """Characters and their labels, from 1 on.

    Args:
        characters: each once.
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
        text = tf.strings.regex_replace(text, r"[^\pL\pM\pN']", " ")
        # An apostrophe beside a letter is set aside while the others go.
        for pattern, replacement in (
            (r"([\pL\pN])'", r"\1_"),
            (r"'([\pL\pN])", r"_\1"),
            ("'", " "),
            ("_", "'"),
            (" +", " "),
        ):
            text = tf.strings.regex_replace(text, pattern, replacement)
        points = tf.strings.unicode_decode(tf.strings.strip(text), "UTF-8")
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
