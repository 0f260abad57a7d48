"""What colour alone tells of a pixel's class: what a network must beat to be worth its electricity.

    python -m benchmarks.colour_threshold --dataset=blue_marble

Two classifiers that look at one pixel at a time, both fitted on the training part and scored as apps.image.segmentation
scores: a threshold of blue minus red between the two most frequent classes, which knows no third class; and a table of
32x32x32 cells of colours, each with the class that most of its training pixels have.
"""

import sys

import numpy as np
from absl import app, flags

from apps import runner, sets
from apps.image import masks
from tfhalf import datasets

_BITS = 5  # of 8 in each channel
_COLOURS = 2 ** (3 * _BITS)


def main() -> None:
    """Runs the program."""
    flags.DEFINE_string("dataset", "blue_marble", "Set of RGB pictures and masks with named classes.")
    flags.DEFINE_string("data_dir", None, "Folder of prepared data sets. Default: TFDS's.")
    app.run(lambda argv: sys.exit(runner.exit_code(_run, argv)))


def _run(argv: list[str]) -> None:
    wanted = {"image": "Image", "segmentation_mask": "LabeledImage"}
    names = sets.require_features(flags.FLAGS, "this baseline", wanted)["segmentation_mask"].names
    builder = datasets.prepare(flags.FLAGS.dataset, flags.FLAGS.data_dir, print)
    splits = dict(zip(("train", "validation", "test"), sets.split_names(builder), strict=True))
    parts = {part: _pixels(builder, split) for part, split in splits.items()}
    rules = {
        "threshold": fit_threshold(*parts["train"], len(names)),
        "colour table": fit_table(*parts["train"], len(names)),
    }
    for rule, predict in rules.items():
        for split, (colours, labels) in parts.items():
            counts = masks.confusion(labels, predict(colours), len(names))
            scores = {"accuracy": np.trace(counts) / counts.sum()} | masks.overlaps(counts, names)
            line = " | ".join(f"{name} {100 * value:.2f}%" for name, value in scores.items())
            print(f"{builder.name}, {rule}, {split}: {line}")


def _pixels(builder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """A part's pixels: uint8 [pixels, 3], and their classes."""
    examples = list(builder.as_dataset(split=split).as_numpy_iterator())
    colours = np.concatenate([example["image"].reshape(-1, 3) for example in examples])
    return colours, np.concatenate([example["segmentation_mask"].ravel() for example in examples])


def fit_threshold(colours: np.ndarray, labels: np.ndarray, num_classes: int):
    """The threshold of blue minus red, and its side for each of the two most frequent classes, with fewest errors."""
    counts = np.bincount(labels, minlength=num_classes)
    first, second = np.argsort(-counts[:num_classes])[:2]
    values = _blue_minus_red(colours) + 255
    # Of each class, the pixels that lie at or above each of the thresholds 0 to 511.
    above = [np.bincount(values[labels == label], minlength=511)[::-1].cumsum()[::-1] for label in (first, second)]
    above = [np.append(row, 0) for row in above]
    right = np.stack([above[0] + counts[second] - above[1], above[1] + counts[first] - above[0]])
    side, threshold = np.unravel_index(right.argmax(), right.shape)
    high, low = ((first, second), (second, first))[side]
    return lambda colours: np.where(_blue_minus_red(colours) + 255 >= threshold, high, low)


def fit_table(colours: np.ndarray, labels: np.ndarray, num_classes: int):
    """The most frequent class of each cell of colours; of a cell never seen, the most frequent class of all."""
    counts = count_cells(colours, labels, num_classes)
    table = np.where(counts.any(axis=1), counts.argmax(axis=1), counts.sum(axis=0).argmax())
    return lambda colours: table[_cells(colours)]


def count_cells(colours: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels by cell of colours and class, int64 [cells, classes]."""
    counted = labels < num_classes
    pairs = _cells(colours[counted]) * num_classes + labels[counted]
    return np.bincount(pairs, minlength=_COLOURS * num_classes).reshape(_COLOURS, num_classes)


def _blue_minus_red(colours: np.ndarray) -> np.ndarray:
    return colours[..., 2].astype(np.int64) - colours[..., 0]


def _cells(colours: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(colours.astype(np.int64) >> (8 - _BITS), -1, 0)
    return (red << 2 * _BITS) | (green << _BITS) | blue


if __name__ == "__main__":
    main()
