"""How far a mean over a sample may be from the truth."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Z_95 = 1.959964


def wilson_interval(num_wins: float, num: int, z: float = Z_95) -> tuple[float, float]:
    """The interval of a share of ``num_wins`` in ``num`` trials, in which half wins may be counted as halves.

    Wilson 1927, as in Brown, Cai and DasGupta 2001, equation 4. Without trials it is (0, 1).
    """
    if num == 0:
        return 0.0, 1.0
    share, spread = num_wins / num, z * z / num
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / num + spread / (4 * num))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_and_error(values: npt.ArrayLike) -> tuple[float, float]:
    """The mean of a sample and its standard error, which is NaN for a single value."""
    array = np.asarray(values, np.float64)
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return float(array.mean()), error


def ratio_and_error(values: npt.ArrayLike, sizes: npt.ArrayLike) -> tuple[float, float]:
    """The sum of ``values`` over the sum of ``sizes``, and its standard error to first order (the delta method)."""
    sums, counts = np.asarray(values, np.float64), np.asarray(sizes, np.float64)
    ratio = float(sums.sum() / counts.sum())
    _, error = mean_and_error(sums - ratio * counts)
    return ratio, error / float(counts.mean())
