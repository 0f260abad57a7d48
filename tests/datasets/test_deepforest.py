"""deepforest, from tiny stand-ins and from the real package."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests import fakes
from tfhalf import datasets
from tfhalf.datasets import DatasetError, deepforest, packages

TRAIN, TEST = "2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop"


def write_stand_in(manual_dir, train_boxes) -> dict[str, np.ndarray]:
    """Two tiles of 450x500 to train and validate, two of 500x450 to test, one each elsewhere."""
    folder = manual_dir / "photos"
    return {
        TRAIN: fakes.write_photo(folder, TRAIN, (900, 500), train_boxes),
        TEST: fakes.write_photo(folder, TEST, (500, 900), [(441, 1, 460, 20)]),
        "OSBS_029": fakes.write_photo(folder, "OSBS_029", (400, 400), [(1, 1, 400, 400)]),
        "SOAP_061": fakes.write_photo(folder, "SOAP_061", (90, 80), []),
    }


def prepare(manual_dir, data_dir) -> dict[str, list]:
    builder = deepforest.Deepforest(data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return {split: list(builder.as_dataset(split=split).as_numpy_iterator()) for split in builder.info.splits}


def by_name(examples) -> dict[str, dict]:
    return {example["image/filename"].decode(): example for example in examples}


def pixel_boxes(example) -> list[tuple[int, ...]]:
    """Boxes as (ymin, xmin, ymax, xmax) in pixels of the tile; exact, float32 holds a pixel of 400 to 2^-15."""
    height, width = example["image"].shape[:2]
    values = example["objects"]["bbox"] * [height, width, height, width]
    np.testing.assert_allclose(values, np.round(values), atol=1e-3)
    return sorted(tuple(box) for box in np.round(values).astype(int).tolist())


def test_stand_in_tiles_and_splits(tmp_path):
    photos = write_stand_in(tmp_path, [])
    parts = prepare(tmp_path, tmp_path / "data")
    assert {split: sorted(by_name(examples)) for split, examples in parts.items()} == {
        "train": [f"{TRAIN}_row0_column0.png"],
        "validation": [f"{TRAIN}_row1_column0.png"],
        "test": [f"{TEST}_row0_column0.png", f"{TEST}_row0_column1.png"],
        "elsewhere": ["OSBS_029_row0_column0.png", "SOAP_061_row0_column0.png"],
    }
    np.testing.assert_array_equal(parts["train"][0]["image"], photos[TRAIN][:450])
    np.testing.assert_array_equal(parts["validation"][0]["image"], photos[TRAIN][450:])
    test = by_name(parts["test"])
    np.testing.assert_array_equal(test[f"{TEST}_row0_column1.png"]["image"], photos[TEST][:, 450:])
    elsewhere = by_name(parts["elsewhere"])
    assert elsewhere["OSBS_029_row0_column0.png"]["objects"]["bbox"].tolist() == [[0, 0, 1, 1]]
    assert len(elsewhere["SOAP_061_row0_column0.png"]["objects"]["bbox"]) == 0


# Boxes as VOC counts, from 1 to the last pixel inclusive; what is expected are edges from 0 in the tile. The border
# between the tiles lies at 450.
@pytest.mark.parametrize(
    ("box", "in_train", "in_validation"),
    [
        ((101, 11, 150, 40), [(10, 100, 40, 150)], []),
        ((101, 431, 150, 470), [(430, 100, 450, 150)], [(0, 100, 20, 150)]),  # half and half
        ((101, 421, 150, 460), [(420, 100, 450, 150)], [(0, 100, 10, 150)]),  # exactly a quarter
        ((101, 419, 150, 458), [(418, 100, 450, 150)], []),  # 8 of 40 rows are below: less than a quarter
        ((101, 443, 150, 482), [], [(0, 100, 32, 150)]),  # 8 of 40 rows are above
        ((481, 11, 520, 40), [(10, 480, 40, 500)], []),  # sticks out of the photo
        ((491, 11, 540, 40), [(10, 490, 40, 500)], []),  # sticks out for four fifths: what is in the photo counts
        ((-9, 11, 10, 40), [(10, 0, 40, 10)], []),
        ((501, 11, 520, 40), [], []),  # lies outside
        ((50, 11, 50, 11), [(10, 49, 11, 50)], []),  # one pixel
        ((60, 20, 50, 40), [], []),  # is none
    ],
)
def test_box_is_given_and_clipped(tmp_path, box, in_train, in_validation):
    write_stand_in(tmp_path, [box])
    parts = prepare(tmp_path, tmp_path / "data")
    assert pixel_boxes(parts["train"][0]) == in_train
    assert pixel_boxes(parts["validation"][0]) == in_validation
    assert parts["train"][0]["objects"]["label"].tolist() == [0] * len(in_train)


def test_box_across_columns(tmp_path):
    write_stand_in(tmp_path, [])
    test = by_name(prepare(tmp_path, tmp_path / "data")["test"])
    # 441 to 460: ten pixels on each side of the border at 450.
    assert pixel_boxes(test[f"{TEST}_row0_column0.png"]) == [(0, 440, 20, 450)]
    assert pixel_boxes(test[f"{TEST}_row0_column1.png"]) == [(0, 0, 20, 10)]


def test_boxes_of_another_photo_are_refused(tmp_path):
    write_stand_in(tmp_path, [])
    Image.new("RGB", (90, 90)).save(tmp_path / "photos" / "SOAP_061.png")
    with pytest.raises(DatasetError, match=r"SOAP_061\.xml: the boxes are for .* \(90, 80\), .*fetch again"):
        prepare(tmp_path, tmp_path / "data")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real data set: (its splits, the folder with the package's files)."""
    folder = tmp_path_factory.mktemp("real")
    lines = []
    builder = datasets.prepare("deepforest", str(folder), lines.append)
    assert "fetching deepforest from packages, 21 MB" in lines
    parts = {split: by_name(builder.as_dataset(split=split).as_numpy_iterator()) for split in builder.info.splits}
    assert builder.info.features["objects"]["label"].names == ["tree"]
    return parts, folder / "downloads" / "manual" / "deepforest" / "photos"


def test_real_package_counts(real):
    parts, _ = real
    assert {split: len(examples) for split, examples in parts.items()} == {
        "train": 30,
        "validation": 6,
        "test": 9,
        "elsewhere": 2,
    }
    counts = {s: sum(len(e["objects"]["label"]) for e in examples.values()) for s, examples in parts.items()}
    assert counts == {"train": 508, "validation": 110, "test": 307, "elsewhere": 98}


@pytest.mark.parametrize(
    ("photo", "splits", "num_boxes"),
    [
        (TRAIN, ("train", "validation"), 574),
        (TEST, ("test",), 279),
        ("OSBS_029", ("elsewhere",), 61),
        ("SOAP_061", ("elsewhere",), 37),
    ],
)
def test_real_tiles_are_the_photo_and_boxes_are_the_files(real, photo, splits, num_boxes):
    parts, folder = real
    source = np.asarray(Image.open(folder / f"{photo}.png"))
    tiles = {}
    for split in splits:
        for name, example in parts[split].items():
            if found := re.fullmatch(photo + r"_row(\d+)_column(\d+)\.png", name):
                tiles[tuple(map(int, found.groups()))] = example
    rows, columns = (1 + max(index) for index in zip(*tiles, strict=True))
    grid = [[tiles.pop((row, column)) for column in range(columns)] for row in range(rows)]
    assert not tiles
    # Each pixel of the photo is in one tile and none is lost, so that no split has another one's.
    np.testing.assert_array_equal(np.vstack([np.hstack([tile["image"] for tile in row]) for row in grid]), source)

    # Second implementation: each pixel knows its tile; a box's pixels are counted tile by tile.
    numbers = [
        [np.full(tile["image"].shape[:2], row * columns + column) for column, tile in enumerate(tiles)]
        for row, tiles in enumerate(grid)
    ]
    tile_of = np.block(numbers)
    corners = [np.unravel_index(np.argmax(tile_of == number), tile_of.shape) for number in range(rows * columns)]
    items = ElementTree.parse(folder / f"{photo}.xml").getroot().findall("object/bndbox")
    assert len(items) == num_boxes
    expected = {number: [] for number in range(rows * columns)}
    for item in items:
        xmin, ymin, xmax, ymax = (int(item.find(side).text) for side in ("xmin", "ymin", "xmax", "ymax"))
        inside = tile_of[ymin - 1 : ymax, xmin - 1 : xmax]
        for number in np.unique(inside):
            if (inside == number).mean() >= 0.25:
                y, x = np.nonzero(inside == number)
                y, x = y + ymin - 1 - corners[number][0], x + xmin - 1 - corners[number][1]
                expected[number].append((y[0], x[0], y[-1] + 1, x[-1] + 1))
    for number, boxes in expected.items():
        assert pixel_boxes(grid[number // columns][number % columns]) == sorted(boxes)


def test_validation_is_the_bottom_row(real):
    parts, _ = real
    assert sorted(parts["validation"]) == [f"{TRAIN}_row5_column{column}.png" for column in range(6)]
    assert not any("_row5_" in name for name in parts["train"])


def test_files_that_are_there_are_not_fetched_again(real, tmp_path):
    _, folder = real
    deepforest.fetch(folder.parent, tmp_path / "nowhere")


def test_damaged_file_is_fetched_again(real, tmp_path):
    _, folder = real
    (tmp_path / "scratch").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / f"{TRAIN}.png").write_bytes(b"half a downl")
    deepforest.fetch(tmp_path, tmp_path / "scratch")
    assert packages.sha256_of_folder(Path(tmp_path, "photos")) == packages.sha256_of_folder(folder)
