"""What text tasks share: texts in memory, pieces learned from them, padding.

Texts of a batch are filled up with PAD to one length (`apps.batches` puts those of similar length together).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from apps import runner
from apps.text import pieces

_MULTIPLE = 8  # lengths of batches: few different ones
_SHOWN_CHARACTERS = 200
_VOCABULARY_TEXTS = 200_000  # learning pieces takes longer with each


def read(builder: tfds.core.DatasetBuilder, split: str, names: Sequence[str]) -> list[np.ndarray]:
    """Returns a part's features, an array each, in the order of the data set; texts are bytes.

    Raises:
        AppError: the part is empty.
    """
    if not builder.info.splits[split].num_examples:  # TFDS can't read it, and says so in its own words
        raise runner.AppError(f"{builder.name}: the part {split} is empty")
    dataset = builder.as_dataset(split=split, shuffle_files=False)
    dataset = dataset.map(lambda example: tuple(example[name] for name in names), tf.data.AUTOTUNE)
    batches = dataset.batch(1024).as_numpy_iterator()
    return [np.concatenate(column) for column in zip(*batches, strict=True)]


def learn_pieces(options, lines: np.ndarray, lowercase: bool) -> pieces.Vocabulary:
    """Returns a vocabulary of `--vocabulary_size` pieces of `lines`.

    Raises:
        AppError: the texts have none.
    """
    step = -(-len(lines) // _VOCABULARY_TEXTS)
    try:
        return pieces.train(lines[::step], options.vocabulary_size, lowercase)
    except ValueError as error:
        raise runner.AppError(f"--vocabulary_size={options.vocabulary_size}: {error}") from error


def to_ragged(rows: Iterable[np.ndarray]) -> tf.RaggedTensor:
    """Returns token ids as one ragged tensor, int32 `[rows, None]`."""
    rows = list(rows)
    values = np.concatenate([np.zeros([0], "int32"), *rows])
    return tf.RaggedTensor.from_row_lengths(values, [len(row) for row in rows])


def pad(token_ids: tf.RaggedTensor) -> tf.Tensor:
    """Returns rows filled up with PAD to one length, a multiple of 8: int32 `[rows, length]`."""
    padded = token_ids.to_tensor(pieces.PAD)
    return tf.pad(padded, [[0, 0], [0, -tf.shape(padded)[1] % _MULTIPLE]], constant_values=pieces.PAD)


def by_length(texts: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns texts and what belongs to them, the shortest texts first, so that a batch needs little padding."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    return tuple(array[order] for array in (texts, *others))


def shortened(lines: Iterable[bytes]) -> list[str]:
    """Returns texts as str, the first 200 characters of each, for a table."""
    return [line.decode(errors="replace")[:_SHOWN_CHARACTERS] for line in lines]


def write_examples(lines: Iterable[bytes], folder: Path) -> None:
    """Writes texts as files, to try apps/predict.py on."""
    for number, line in enumerate(lines, 1):
        (folder / f"text{number}.txt").write_bytes(line + b"\n")
