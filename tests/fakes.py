"""Tiny stand-ins for real files, so that the real loaders run in tests."""

import gzip
from pathlib import Path

import numpy as np


def write_mnist_csv(path: Path, num_rows: int) -> np.ndarray:
    """Writes a file like mnist_5k's: rows of 784 grey values and a label. Returns them, uint8 [num_rows, 785]."""
    rows = np.random.default_rng(0).integers(0, 256, [num_rows, 785], dtype=np.uint8)
    rows[:, 784] = np.arange(num_rows) * 10 // num_rows
    with gzip.open(path, "wt", encoding="ascii") as file:
        np.savetxt(file, rows, fmt="%d", delimiter=",")
    return rows
