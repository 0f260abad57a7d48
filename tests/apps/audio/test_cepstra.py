"""Distortion against the distance of spectra in dB, time warping against the textbook's recursion."""

import numpy as np
import pytest

from apps.audio import cepstra


def test_distortion_is_the_distance_of_smooth_spectra_in_decibels():
    bands = 80
    cosines = np.cos(np.pi * np.outer(np.arange(1, 14), np.arange(bands) + 0.5) / bands)
    random = np.random.default_rng(0)
    one, other = (random.normal(size=13) @ cosines for _ in range(2))  # log power
    decibels = 10 / np.log(10) * (one - other)
    expected = np.sqrt(np.mean(decibels**2))
    assert cepstra.distortion(one[np.newaxis], other[np.newaxis]) == pytest.approx(expected, rel=1e-6)


def test_distortion_hears_neither_loudness_nor_speed():
    random = np.random.default_rng(1)
    spoken = np.cumsum(random.normal(size=[30, 80]), axis=0)
    assert cepstra.distortion(spoken, spoken) == pytest.approx(0, abs=1e-4)
    assert cepstra.distortion(spoken, 3 + np.repeat(spoken, 2, axis=0)) == pytest.approx(0, abs=1e-4)
    assert cepstra.distortion(spoken, spoken[::-1]) > 1


def slowly(distances: np.ndarray) -> tuple[float, int]:
    totals = {}
    for row, column in np.ndindex(distances.shape):
        before = [(row - 1, column - 1), (row - 1, column), (row, column - 1)]
        ways = [totals[pair] for pair in before if pair in totals] or [(0.0, 0)]
        total, count = min(ways, key=lambda way: way[0])
        totals[row, column] = (total + distances[row, column], count + 1)
    return totals[distances.shape[0] - 1, distances.shape[1] - 1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (5, 5), (4, 9), (11, 3)])
def test_warping_is_the_textbooks(shape):
    distances = np.random.default_rng(sum(shape)).random(shape)
    total, num_pairs = cepstra.warp(distances)
    expected, count = slowly(distances)
    assert total == pytest.approx(expected)
    assert num_pairs == count
