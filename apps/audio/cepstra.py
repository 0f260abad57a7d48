"""How far synthetic speech is from a recording of the same sentence: mel-cepstral distortion.

Mel-cepstra are cosine transforms of log-mel features here, not SPTK's, so numbers compare with those of the same
features only. The two were spoken at different speeds, so frames are paired by dynamic time warping: along the path
through all pairs of frames that has the least distance in all.

Sources: Kubichek 1993, "Mel-cepstral distance measure for objective speech quality assessment", IEEE Pacific Rim
Conference; Sakoe and Chiba 1978, "Dynamic programming algorithm optimization for spoken word recognition", IEEE
Transactions on Acoustics, Speech, and Signal Processing 26(1).
"""

import numpy as np
import scipy.fft

_ORDER = 13  # coefficients that count; the first one, of loudness, doesn't
_TO_DECIBELS = 10 * np.sqrt(2) / np.log(10)


def distortion(reference: np.ndarray, estimate: np.ndarray) -> float:
    """Returns mel-cepstral distortion in dB, the mean over pairs of frames.

    Args:
        reference: natural logarithms of power in mel bands, float `[frames, bands]`, of 14 bands or more.
        estimate: the same of the other one, `[other frames, bands]`.
    """
    # Mel-cepstra c are those of log|H| = c_0 + sum of c_d cos(d w): so is distortion the distance of spectra in dB.
    scale = 1 / np.sqrt(2 * reference.shape[1])
    rows, columns = (
        scale * scipy.fft.dct(each.astype(np.float64), norm="ortho")[:, 1 : _ORDER + 1]
        for each in (reference, estimate)
    )
    squares = np.sum(rows**2, axis=1)[:, np.newaxis] + np.sum(columns**2, axis=1) - 2 * rows @ columns.T
    total, num_pairs = warp(np.sqrt(np.maximum(squares, 0.0)))
    return float(_TO_DECIBELS * total / num_pairs)


def warp(distances: np.ndarray) -> tuple[float, int]:
    """Returns the least sum of distances along a path from the first pair to the last, and how many pairs it has.

    From a pair the path goes on to the next row, the next column, or both.

    Args:
        distances: float `[rows, columns]`, 1 or more of each.
    """
    rows, columns = distances.shape
    # Diagonal by diagonal, of pairs whose row and column have one sum: each depends on the two before it only. Row r of
    # a diagonal is at r + 1; a step to the next row comes from r, one to the next column from r + 1.
    before, last = np.full(rows + 1, np.inf), np.full(rows + 1, np.inf)
    lengths_before, lengths_last = np.zeros(rows + 1, int), np.zeros(rows + 1, int)
    for diagonal in range(rows + columns - 1):
        row = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        ways = np.stack([before[row], last[row], last[row + 1]])
        lengths = np.stack([lengths_before[row], lengths_last[row], lengths_last[row + 1]])
        best = np.argmin(ways, axis=0)
        chosen = np.take_along_axis(ways, best[np.newaxis], axis=0)[0] if diagonal else np.zeros(1)
        totals, counts = np.full(rows + 1, np.inf), np.zeros(rows + 1, int)
        totals[row + 1] = chosen + distances[row, diagonal - row]
        counts[row + 1] = np.take_along_axis(lengths, best[np.newaxis], axis=0)[0] + 1
        before, last, lengths_before, lengths_last = last, totals, lengths_last, counts
    return float(last[rows]), int(lengths_last[rows])
