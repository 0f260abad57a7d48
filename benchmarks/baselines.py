"""Accuracy of a classical classifier on the same split: what a network must beat to be worth its electricity.

    python -m benchmarks.baselines --dataset=mnist_5k

An RBF support vector machine (scikit-learn's, C=5, gamma="scale") on pixels, trained on the whole training part.
"""

import sys

import numpy as np
from absl import app, flags
from sklearn import svm

from apps import runner
from tfhalf import datasets


def main() -> None:
    """Runs the program."""
    flags.DEFINE_string("dataset", "mnist_5k", "Set of small pictures: a TFDS name, or mnist_5k.")
    flags.DEFINE_string("data_dir", None, "Folder of prepared data sets. Default: TFDS's.")
    app.run(lambda argv: sys.exit(runner.exit_code(_run, argv)))


def _run(argv: list[str]) -> None:
    builder = datasets.prepare(flags.FLAGS.dataset, flags.FLAGS.data_dir, print)
    parts = {}
    for split in ("train", "test"):
        examples = list(builder.as_dataset(split=split).as_numpy_iterator())
        pixels = np.stack([example["image"].ravel() for example in examples]) / 255.0
        parts[split] = pixels, np.array([example["label"] for example in examples])
    classifier = svm.SVC(C=5.0, gamma="scale").fit(*parts["train"])
    pixels, labels = parts["test"]
    correct = int(np.sum(classifier.predict(pixels) == labels))
    print(f"SVC-RBF on {builder.name}: Accuracy: {100 * correct / len(labels):.2f}% ({correct}/{len(labels)})")


if __name__ == "__main__":
    main()
