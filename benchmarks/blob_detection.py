"""Objects found as blobs, without learning more than a size: what a detector must beat to be worth its electricity.

    python -m benchmarks.blob_detection --dataset=deepforest

A Laplacian of Gaussian (Lindeberg 1998, "Feature detection with automatic scale selection") answers most strongly in
the middle of a bright or a dark spot of its size. Channel, sign, and size are those with the best AP50 on the training
part; each local maximum becomes a box of the median size of the training part's objects. One class only.
"""

import itertools
import sys

import numpy as np
from absl import app, flags
from scipy import ndimage

from apps import runner, sets
from apps.image import boxes
from tfhalf import datasets

# Brightness, and how green or dark a pixel is.
_CHANNELS = {"brightness": (1, 1, 1), "green": (-1, 2, -1), "red": (1, 0, 0), "blue": (0, 0, 1)}
_SIZES = (0.5, 0.7, 1.0)
_MOST = 100


def main() -> None:
    """Runs the program."""
    flags.DEFINE_string("dataset", "deepforest", "Set of RGB pictures and boxes of one class.")
    flags.DEFINE_string("data_dir", None, "Folder of prepared data sets. Default: TFDS's.")
    app.run(lambda argv: sys.exit(runner.exit_code(_run, argv)))


def _run(argv: list[str]) -> None:
    features = sets.require_features(flags.FLAGS, "this baseline", {"image": "Image", "objects": "Sequence"})
    if (num_classes := features["objects"]["label"].num_classes) > 1:
        raise runner.AppError(f"--dataset={flags.FLAGS.dataset} has {num_classes} classes; this baseline tells one")
    builder = datasets.prepare(flags.FLAGS.dataset, flags.FLAGS.data_dir, print)
    splits = dict(zip(("train", "validation", "test"), sets.split_names(builder), strict=True))
    parts = {part: _read(builder, split) for part, split in splits.items()}
    truth = np.concatenate([true_boxes for _, true_boxes in parts["train"]])
    side = np.median(np.sqrt(np.prod(truth[:, 2:] - truth[:, :2], axis=1)))
    choices = list(itertools.product(_CHANNELS, (1, -1), _SIZES))
    best = max(choices, key=lambda choice: _score(parts["train"], side, *choice)["AP50"])
    print(f"{builder.name}: boxes of {side:.0f} pixels; best on train: {best[0]}, sign {best[1]}, size {best[2]}")
    for split, examples in parts.items():
        scores = _score(examples, side, *best)
        print(f"{split}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))


def _read(builder, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    examples = []
    for example in builder.as_dataset(split=split).as_numpy_iterator():
        height, width = example["image"].shape[:2]
        examples.append(
            (example["image"].astype("float32"), example["objects"]["bbox"] * np.array([height, width] * 2))
        )
    return examples


def _score(examples, side: float, channel: str, sign: int, size: float) -> dict[str, float]:
    scores = boxes.CocoScores(1)
    for picture, true_boxes in examples:
        found, strengths = blobs(picture @ np.array(_CHANNELS[channel], "float32") * sign, side, size)
        scores.add(true_boxes, [0] * len(true_boxes), found, [0] * len(found), strengths)
    return scores.scores()


def blobs(values: np.ndarray, side: float, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns boxes, float `[n, 4]`, around the strongest bright spots of about `size * side` pixels; and strengths."""
    radius = size * side / 2
    strength = -ndimage.gaussian_laplace(values, radius / np.sqrt(2))  # a disc's strongest scale is r / sqrt(2)
    peaks = (strength == ndimage.maximum_filter(strength, max(3, int(radius)))) & (strength > 0)
    y, x = np.nonzero(peaks)
    order = np.argsort(-strength[y, x])[:_MOST]
    middles = np.stack([y[order], x[order]], axis=1) + 0.5
    limits = [*values.shape] * 2
    return np.clip(np.concatenate([middles - side / 2, middles + side / 2], axis=1), 0, limits), strength[y, x][order]


if __name__ == "__main__":
    main()
