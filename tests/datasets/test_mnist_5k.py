"""mnist_5k, from a tiny stand-in and from the real package."""

import gzip

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests import fakes
from tfhalf.datasets import DatasetError, mnist_5k, packages


def prepare(manual_dir, data_dir) -> dict[str, list]:
    builder = mnist_5k.Mnist5k(data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return {split: list(builder.as_dataset(split=split).as_numpy_iterator()) for split in builder.info.splits}


def test_stand_in_splits_and_pixels(tmp_path):
    rows = fakes.write_mnist_csv(tmp_path / "mnist_5k.csv.gz", 20)
    parts = prepare(tmp_path, tmp_path / "data")
    assert {split: len(examples) for split, examples in parts.items()} == {"train": 16, "test": 4}
    seen = {(example["label"], example["image"].tobytes()) for example in parts["test"]}
    assert seen == {(rows[i][784], bytes(rows[i][:784])) for i in (4, 9, 14, 19)}
    assert parts["train"][0]["image"].shape == (28, 28, 1)


def test_real_package_counts_and_pixels(data_dir):
    builder = tfds.builder("mnist_5k", data_dir=data_dir)
    parts = {split: list(builder.as_dataset(split=split).as_numpy_iterator()) for split in ("train", "test")}
    for split, each in (("train", 400), ("test", 100)):
        labels = [example["label"] for example in parts[split]]
        np.testing.assert_array_equal(np.bincount(labels), [each] * 10)
    with gzip.open(f"{data_dir}/downloads/manual/mnist_5k/mnist_5k.csv.gz", "rt") as file:
        lines = [line.strip().split(",") for line in file]
    row = [int(float(value)) for value in lines[2504]]  # 2504 % 5 == 4: the test part
    assert any(e["label"] == row[784] and e["image"].ravel().tolist() == row[:784] for e in parts["test"])


def test_no_picture_is_on_both_sides(data_dir):
    builder = tfds.builder("mnist_5k", data_dir=data_dir)
    train, test = (
        {e["image"].tobytes() for e in builder.as_dataset(split=s).as_numpy_iterator()} for s in ("train", "test")
    )
    assert not train & test


@pytest.mark.parametrize("line", ["1,2,3", ",".join(["300"] * 785)])
def test_file_of_another_shape_is_refused(tmp_path, line):
    with gzip.open(tmp_path / "mnist_5k.csv.gz", "wt") as file:
        file.write(line + "\n" + line + "\n")
    with pytest.raises(DatasetError, match="expected rows of 784 grey values"):
        prepare(tmp_path, tmp_path / "data")


def test_file_that_is_there_is_not_fetched_again(data_dir, tmp_path):
    from pathlib import Path

    mnist_5k.fetch(Path(data_dir, "downloads/manual/mnist_5k"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_file_is_fetched_again(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "mnist_5k.csv.gz").write_bytes(b"half a downl")
    mnist_5k.fetch(tmp_path, tmp_path / "scratch")
    assert packages.sha256(tmp_path / "mnist_5k.csv.gz") == mnist_5k._FILE_SHA256
