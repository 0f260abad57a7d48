"""`composites`: photographed things pasted over photographed places, with exact boxes and masks.

Composited, not photographed: cut-outs with alpha (Debian's tuxpaint-stamps-default) over backgrounds (Debian's
scratch), so that edges, light and scale tell more than in a real photo. What a background itself shows, say a
flower-bed, counts as background; trees, of which many backgrounds are full, are therefore no class.

Stamps: those in the folders of `_FOLDERS`, which are animals, food, flowers and things; left out are folders of
drawings and toys, stamps of fewer than 64 colours (drawings again, grey ones), and the few of `_LEFT_OUT`. 262 remain
in 13 classes, which are the package's folders: a lobster is in `fish`, a slug in `insect`. Of 61 backgrounds
the 53 photographed ones are used.

Splits: of each class' stamps, and of the backgrounds, about a fifth tests, about a tenth validates, the rest trains;
a stamp or a background is in one split only. Names that begin with the same word (gnu-baby, gnu-sitting;
train-tracks1, train-tracks2) may show one thing twice and stay together. Which word goes where is decided by the
word's sha256.

A picture: a 256x256 part of a background, perhaps mirrored; then one to five stamps, each of a class drawn first, so
that classes are equally frequent: 32 to 128 pixels long but never enlarged, perhaps mirrored, turned by up to 20
degrees, at most an eighth of its width and height outside. A later stamp covers earlier ones, but a place where it
would hide more than a third of one isn't taken. The mask says what is visible (alpha above a half), a box is the bounds
of its thing's visible pixels. Picture `i` of a split is drawn by numpy's generator seeded with (split, i): it is the
same everywhere with the same numpy and Pillow.

Source: D. Dwibedi et al., "Cut, Paste and Learn", ICCV 2017, for what pasting can do, and for its traces.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tfhalf.datasets import packages

_STAMPS_PACKAGE, _STAMPS_PATH = "tuxpaint-stamps-default", "usr/share/tuxpaint/stamps"
_STAMPS_SHA256 = "0e2e7f8a8c7a0b080f4deee7ae17856809df2c7783090c82e1c568cdba1e32e5"
_BACKGROUNDS_PACKAGE, _BACKGROUNDS_PATH = "scratch", "usr/share/scratch/Media/Backgrounds"
_BACKGROUNDS_SHA256 = "f795079e3d5ada462e8ebd2720ab9bcb46768928b9a97a42facada98542fa9ff"
# Folder of stamps to class; folders inside it count too, and the nearest one decides.
_FOLDERS = {
    "animals/birds": "bird",
    "animals/fish": "fish",
    "animals/insects": "insect",
    "animals/mammals": "mammal",
    "animals/marsupials": "mammal",
    "food/fruit": "fruit",
    "food/vegetables": "vegetable",
    "hobbies/music": "instrument",
    "household": "household",
    "household/tools": "tool",
    "military/vehicles": "vehicle",
    "plants/flowers": "flower",
    "space/moon": "planet",
    "space/planets": "planet",
    "sports": "sport",
    "vehicles": "vehicle",
}
_CLASSES = sorted(set(_FOLDERS.values()))
_NOT_PHOTOGRAPHED = {"cartoon", "plastic", "toys"}
_LEFT_OUT = {
    "hedgehog.png",  # drawn, in many colours
    "sedan_police.png",  # its body is transparent
    "wheel_tractor.png",  # a part of a vehicle
}
_DRAWN_BACKGROUNDS = {
    "brick-wall1.jpg",
    "party-room.jpg",
    "room1.jpg",
    "room2.jpg",
    "room3.jpg",
    "school2.jpg",
    "spotlight-stage.jpg",
    "woods-and-bench.jpg",
}
_MIN_COLOURS = 64
_PICTURE_PIXELS = 256
_MIN_STAMP_PIXELS, _MAX_STAMP_PIXELS = 32, 128
_MAX_STAMPS = 5
_MAX_DEGREES = 20
_MAX_HIDDEN = 1 / 3
_MIN_VISIBLE_PIXELS = 64  # less isn't to be recognised: 8x8
_TRIALS_PER_STAMP = 10
_SPLITS = ("train", "validation", "test")


class _Stamp(NamedTuple):
    name: str
    label: str
    pixels: Image.Image  # RGBA


class Composites(tfds.core.GeneratorBasedBuilder):
    """TFDS builder: 1,600 composited pictures to train, 200 to validate, 400 to test; 13 classes, boxes and masks."""

    name = "composites"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Run: python -m apps.data --dataset=composites (takes pictures from Debian's packages "
        f"{_STAMPS_PACKAGE} and {_BACKGROUNDS_PACKAGE}; needs apt-get)."
    )
    num_pictures = (1600, 200, 400)  # of each of _SPLITS

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (_PICTURE_PIXELS, _PICTURE_PIXELS)
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "Composited, not photographed: 262 cut-outs of 13 classes from Tux Paint, pasted over 53 backgrounds "
                "from Scratch, with exact boxes and masks. No cut-out and no background is in two splits. Licences: "
                "stamps GPL-2 or later, backgrounds CC-BY-SA-3.0."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(*shape, 3)),
                    "image/filename": tfds.features.Text(),
                    "image/background": tfds.features.Text(doc="File that the background is from."),
                    "image/stamps": tfds.features.Sequence(
                        tfds.features.Text(), doc="Files that the objects are from, in their order."
                    ),
                    "segmentation_mask": tfds.features.LabeledImage(
                        labels=["background", *_CLASSES], shape=(*shape, 1)
                    ),
                    "objects": tfds.features.Sequence(
                        {
                            "bbox": tfds.features.BBoxFeature(),
                            "label": tfds.features.ClassLabel(names=_CLASSES),
                        }
                    ),
                }
            ),
            homepage="https://tuxpaint.org/stamps/",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        folder = Path(dl_manager.manual_dir)
        stamps = _split_stamps(_read_stamps(folder / "stamps"))
        backgrounds = _split(_background_names(folder / "backgrounds"))
        for split in _SPLITS:
            if not stamps[split] or not backgrounds[split]:
                raise packages.DatasetError(
                    f"{folder}: {len(stamps[split])} classes of stamps and {len(backgrounds[split])} backgrounds for "
                    f"{split}; remove the folder and fetch again"
                )
        return {
            split: self._generate_examples(index, stamps[split], folder / "backgrounds", backgrounds[split])
            for index, split in enumerate(_SPLITS)
        }

    def _generate_examples(self, split: int, stamps: dict[str, list[_Stamp]], folder: Path, names: list[str]):
        backgrounds = [_read_background(folder / name) for name in names]
        for index in range(self.num_pictures[split]):
            random = np.random.default_rng([split, index])
            chosen = random.integers(len(names))
            picture, owner, placed = _compose(random, _crop(random, backgrounds[chosen]), stamps)
            labels = np.array([0] + [_CLASSES.index(stamp.label) + 1 for stamp in placed], np.uint8)
            name = f"{_SPLITS[split]}_{index:04}.png"
            yield (
                name,
                {
                    "image": picture,
                    "image/filename": name,
                    "image/background": names[chosen],
                    "image/stamps": [stamp.name for stamp in placed],
                    "segmentation_mask": labels[owner][..., np.newaxis],
                    "objects": [
                        {"bbox": _bounds(owner == number), "label": stamp.label}
                        for number, stamp in enumerate(placed, start=1)
                    ],
                },
            )


def fetch(manual_dir: Path, scratch: Path) -> None:
    """Puts stamps and backgrounds into `manual_dir`, unless they are there already and are the right ones."""
    stamps, backgrounds = manual_dir / "stamps", manual_dir / "backgrounds"
    if packages.sha256_of_folder(stamps) != _STAMPS_SHA256:
        source = _unpack(_STAMPS_PACKAGE, scratch) / _STAMPS_PATH
        names = [name for name in _names(source, ".png") if _label(name)]
        packages.keep(names, source, stamps, _STAMPS_SHA256)
    if packages.sha256_of_folder(backgrounds) != _BACKGROUNDS_SHA256:
        source = _unpack(_BACKGROUNDS_PACKAGE, scratch) / _BACKGROUNDS_PATH
        packages.keep(_background_names(source), source, backgrounds, _BACKGROUNDS_SHA256)


def _unpack(package: str, scratch: Path) -> Path:
    folder = scratch / package
    folder.mkdir()
    return packages.fetch_deb(package, folder)


def _names(folder: Path, ending: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob(f"*{ending}"))


def _background_names(folder: Path) -> list[str]:
    return [name for name in _names(folder, ".jpg") if Path(name).name not in _DRAWN_BACKGROUNDS]


def _label(name: str) -> str | None:
    """Returns the class of a stamp, None when it isn't of our classes."""
    path = Path(name)
    if path.name in _LEFT_OUT or path.stem.endswith("_mirror") or _NOT_PHOTOGRAPHED & set(path.parts):
        return None  # a _mirror is another stamp's picture again
    return next((_FOLDERS[str(parent)] for parent in path.parents if str(parent) in _FOLDERS), None)


def _read_stamps(folder: Path) -> list[_Stamp]:
    """Reads what is a cut-out and photo-like, trimmed to what is visible."""
    stamps = []
    for name in _names(folder, ".png"):
        label = _label(name)
        if label is None:
            continue
        pixels = Image.open(folder / name).convert("RGBA")
        pixels = pixels.crop(_visible(pixels).getbbox())
        # Twice what is needed: large ones would only cost time.
        pixels.thumbnail((2 * _MAX_STAMP_PIXELS,) * 2)
        if _is_photo_like(pixels):
            stamps.append(_Stamp(name, label, pixels))
    return stamps


def _visible(pixels: Image.Image) -> Image.Image:
    return pixels.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0)


def _is_photo_like(pixels: Image.Image) -> bool:
    values = np.asarray(pixels)
    visible = values[..., 3] > 127
    colours = values[visible][:, :3] >> 3  # 32 levels: noise and compression make no colour of their own
    return not visible.all() and len(np.unique(colours, axis=0)) >= _MIN_COLOURS


def _split_stamps(stamps: list[_Stamp]) -> dict[str, dict[str, list[_Stamp]]]:
    """Splits each class by itself: split to class to stamps."""
    by_split = {split: {} for split in _SPLITS}
    for label in _CLASSES:
        by_name = {stamp.name: stamp for stamp in stamps if stamp.label == label}
        for split, names in _split(by_name).items():
            if names:
                by_split[split][label] = [by_name[name] for name in names]
    return by_split


def _split(names: Iterable[str]) -> dict[str, list[str]]:
    """Splits names about 70/10/20; those that begin with the same word stay together."""
    families = defaultdict(list)
    for name in sorted(names):
        families[re.search(r"[a-z]*", Path(name).stem.lower().lstrip("0123456789_")).group()].append(name)
    total = sum(map(len, families.values()))
    room = {"test": -(-total // 5), "validation": max(1, round(0.1 * total)), "train": total}
    parts = {split: [] for split in _SPLITS}
    for word in sorted(families, key=lambda word: hashlib.sha256(word.encode()).digest()):
        family = families[word]
        split = next(split for split in room if len(parts[split]) + len(family) <= room[split])
        parts[split] += family
    return {split: sorted(part) for split, part in parts.items()}


def _read_background(path: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    if min(pixels.shape[:2]) < _PICTURE_PIXELS:
        raise packages.DatasetError(
            f"{path}: {pixels.shape[1]}x{pixels.shape[0]} pixels, at least {_PICTURE_PIXELS} each way are needed; "
            "remove the folder and fetch again"
        )
    return pixels


def _crop(random: np.random.Generator, background: np.ndarray) -> np.ndarray:
    y, x = (random.integers(length - _PICTURE_PIXELS + 1) for length in background.shape[:2])
    part = background[y : y + _PICTURE_PIXELS, x : x + _PICTURE_PIXELS]
    return (part[:, ::-1] if random.integers(2) else part).copy()


def _compose(
    random: np.random.Generator, picture: np.ndarray, stamps: dict[str, list[_Stamp]]
) -> tuple[np.ndarray, np.ndarray, list[_Stamp]]:
    """Pastes stamps. Returns picture, owner of each pixel (0: background, n: n-th stamp) and the stamps."""
    owner = np.zeros([_PICTURE_PIXELS, _PICTURE_PIXELS], np.uint8)
    placed, sizes = [], []  # sizes: visible pixels of each when it was pasted
    labels = sorted(stamps)
    wanted = random.integers(1, _MAX_STAMPS + 1)
    for _ in range(wanted * _TRIALS_PER_STAMP):
        of_class = stamps[labels[random.integers(len(labels))]]
        stamp = of_class[random.integers(len(of_class))]
        cut_out = _vary(random, stamp.pixels)
        window, cut_out = _place(random, cut_out)
        visible = cut_out[..., 3] > 127
        trial = owner.copy()
        trial[window][visible] = len(placed) + 1
        remaining = np.bincount(trial.ravel(), minlength=len(placed) + 2)[1:]
        if remaining[-1] < _MIN_VISIBLE_PIXELS or (remaining[:-1] < (1 - _MAX_HIDDEN) * np.array(sizes)).any():
            continue
        owner = trial
        picture[window] = _blend(picture[window], cut_out)
        placed.append(stamp)
        sizes.append(remaining[-1])
        if len(placed) == wanted:
            break
    return picture, owner, placed


def _vary(random: np.random.Generator, pixels: Image.Image) -> Image.Image:
    longest = max(pixels.size)
    size = random.integers(_MIN_STAMP_PIXELS, max(_MIN_STAMP_PIXELS, min(_MAX_STAMP_PIXELS, longest)) + 1)
    pixels = pixels.resize([max(1, round(side * size / longest)) for side in pixels.size], Image.Resampling.LANCZOS)
    if random.integers(2):
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    degrees = int(random.integers(-_MAX_DEGREES, _MAX_DEGREES + 1))
    return pixels.rotate(degrees, Image.Resampling.BICUBIC, expand=True)


def _place(random: np.random.Generator, pixels: Image.Image) -> tuple[tuple[slice, slice], np.ndarray]:
    """Returns a window of the picture and the part of the cut-out that is in it."""
    values = np.asarray(pixels)
    window, part = [], []
    for length in values.shape[:2]:
        start = int(random.integers(-(length // 8), _PICTURE_PIXELS - length + length // 8 + 1))
        low, high = max(start, 0), min(start + length, _PICTURE_PIXELS)
        window.append(slice(low, high))
        part.append(slice(low - start, high - start))
    return tuple(window), values[tuple(part)]


def _blend(below: np.ndarray, above: np.ndarray) -> np.ndarray:
    alpha = above[..., 3:].astype(np.uint32)
    return ((above[..., :3] * alpha + below * (255 - alpha) + 127) // 255).astype(np.uint8)


def _bounds(visible: np.ndarray) -> tfds.features.BBox:
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    return tfds.features.BBox(
        ymin=rows[0] / _PICTURE_PIXELS,
        xmin=columns[0] / _PICTURE_PIXELS,
        ymax=(rows[-1] + 1) / _PICTURE_PIXELS,
        xmax=(columns[-1] + 1) / _PICTURE_PIXELS,
    )
