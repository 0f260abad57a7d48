"""Tiny stand-ins for real files, so that the real loaders run in tests."""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image


def write_mnist_csv(path: Path, num_rows: int) -> np.ndarray:
    """Writes a file like mnist_5k's: rows of 784 grey values and a label. Returns them, uint8 [num_rows, 785]."""
    rows = np.random.default_rng(0).integers(0, 256, [num_rows, 785], dtype=np.uint8)
    rows[:, 784] = np.arange(num_rows) * 10 // num_rows
    with gzip.open(path, "wt", encoding="ascii") as file:
        np.savetxt(file, rows, fmt="%d", delimiter=",")
    return rows


def write_photo(folder: Path, name: str, size: tuple[int, int], boxes: list[tuple[int, int, int, int]]) -> np.ndarray:
    """Writes a photo and its boxes like deepforest's: PNG and VOC's XML.

    `size` is (height, width), a box is VOC's (xmin, ymin, xmax, ymax). Returns the pixels, uint8 [height, width, 3].
    """
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(name)).integers(0, 256, [*size, 3], dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    sides = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        "<object><name>Tree</name><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, box, strict=True))
        + "</bndbox></object>"
        for box in boxes
    )
    (folder / f"{name}.xml").write_text(
        f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
        f"{objects}</annotation>"
    )
    return pixels


def write_map(folder: Path, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Writes a picture and a mask like blue_marble's, the mask three times as fine and from south to north.

    Returns the picture as a decoder gives it, uint8 [height, 2 * height, 3], and the mask with north up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, [height, 2 * height, 3], dtype=np.uint8)).save(folder / "bmng.jpg")
    mask = random.integers(0, 3, [3 * height, 6 * height], dtype=np.uint8)
    (folder / "lsmask_1.25min_f.bin").write_bytes(gzip.compress(mask[::-1].tobytes(), 1))
    return np.asarray(Image.open(folder / "bmng.jpg")), mask


def write_stamps(folder: Path, stamp_pixels: int, num_stamps: int = 5, num_backgrounds: int = 5) -> None:
    """Writes stamps and backgrounds like those of composites, made so that a picture tells what was pasted.

    Backgrounds are black, 300x280. Stamps are squares with a corner off: birds are full of red, fruits of green,
    vehicles of blue; the two other channels are noise up to 127. So the strongest channel of a pixel is its alpha.
    """
    random = np.random.default_rng(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    for channel, path in enumerate(("animals/birds", "food/fruit", "vehicles/auto")):
        (folder / "stamps" / path).mkdir(parents=True, exist_ok=True)
        for letter in letters[:num_stamps]:
            pixels = random.integers(0, 128, [stamp_pixels, stamp_pixels, 4], dtype=np.uint8)
            pixels[..., channel] = pixels[..., 3] = 255
            pixels[0, 0, 3] = 0
            Image.fromarray(pixels).save(folder / "stamps" / path / f"{letter}.png")
    (folder / "backgrounds" / "Nature").mkdir(parents=True, exist_ok=True)
    for letter in letters[:num_backgrounds]:
        Image.new("RGB", (300, 280)).save(folder / "backgrounds" / "Nature" / f"{letter}.jpg")
