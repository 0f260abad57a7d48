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
