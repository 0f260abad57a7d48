"""Feeds TFDS's own `fashion_mnist` builder from Debian's package dataset-fashion-mnist, where the web isn't reachable.

Debian normalised the header of the four gzip files (no name, no time), so their sha256 differ from the ones
that TFDS knows, though the compressed bytes are the same. Writing the original header back (RFC 1952: magic,
deflate, FNAME flag, time, OS 3, name) restores the original files bit by bit: the sha256 are then TFDS's own.
"""

import struct
from pathlib import Path

from tfhalf.datasets import packages

_PACKAGE = "dataset-fashion-mnist"
_TRAIN_TIME, _TEST_TIME = 1504176606, 1504176627  # when Zalando compressed them
_PLAIN_HEADER_BYTES = 10


def fetch(manual_dir: Path, scratch: Path, checksums: dict[str, str]) -> None:
    """Puts the four original files into `manual_dir`.

    Args:
        manual_dir: existing folder that TFDS looks into before it downloads.
        scratch: existing empty folder to work in.
        checksums: file name to sha256, as TFDS knows them.

    Raises:
        DatasetError: the package can't be had, or a rebuilt file isn't the original.
    """
    if all(
        (manual_dir / name).exists() and packages.sha256(manual_dir / name) == checksums[name] for name in checksums
    ):
        return
    source = packages.fetch_deb(_PACKAGE, scratch) / "usr/share/datasets/fashion-mnist"
    for name, digest in checksums.items():
        rebuilt = scratch / name
        rebuilt.write_bytes(restore_gzip_header((source / name).read_bytes(), name))
        if packages.sha256(rebuilt) != digest:
            raise packages.DatasetError(f"{_PACKAGE}: {name} isn't the file that TFDS expects (sha256 {digest})")
        rebuilt.replace(manual_dir / name)


def restore_gzip_header(compressed: bytes, name: str) -> bytes:
    """Returns the gzip file with its original name and time in the header."""
    time = _TRAIN_TIME if name.startswith("train") else _TEST_TIME
    header = b"\x1f\x8b\x08\x08" + struct.pack("<I", time) + b"\x00\x03" + name.removesuffix(".gz").encode() + b"\x00"
    return header + compressed[_PLAIN_HEADER_BYTES:]
