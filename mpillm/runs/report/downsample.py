"""Downsample long curves for a picture: every spike is kept, and a median smooths the noise."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Curve = NDArray[np.float64]
MOST_POINTS = 2000
# A plot's margins overflow beyond this.
LARGEST = 1e300
# The smooth line is a median over this share of the steps; below this number of steps it would
# only repeat the values.
SMOOTH_SHARE, FEWEST_TO_SMOOTH = 1 / 50, 20


def curve(values: ArrayLike) -> Curve:
    """Convert to float64, with NaN, a gap in the picture, for each value that cannot be drawn."""
    found = np.array(values, dtype=np.float64)
    found[~(np.abs(found) < LARGEST)] = np.nan
    return found


def thin(x: Curve, y: Curve, most: int = MOST_POINTS) -> tuple[Curve, Curve]:
    """Keep at most `most` (4 or more) points: the extremes of each bin, the first and the last.

    A bin without any number stays as a gap.
    """
    if len(x) <= most:
        return x, y
    bins = (most - 2) // 2
    starts = np.linspace(0, len(x), bins + 1).astype(np.int64)
    chosen = {0, len(x) - 1}
    for first, end in pairwise(starts):
        part = y[first:end]
        chosen.add(int(first + np.argmin(np.where(np.isnan(part), np.inf, part))))
        chosen.add(int(first + np.argmax(np.where(np.isnan(part), -np.inf, part))))
    index: NDArray[Any] = np.array(sorted(chosen))
    return x[index], y[index]


def smooth(x: Curve, y: Curve, most: int = MOST_POINTS // 4) -> tuple[Curve, Curve]:
    """Take at most `most` points, each the median of a window around it.

    Medians skip gaps; a window without any number is a gap. At the steep beginning the window
    shrinks on both sides, so that the line begins with the curve. At the end it shrinks on the
    right alone, so that one last value does not bend the line.
    """
    half = max(1, int(len(y) * SMOOTH_SHARE / 2))
    at = np.unique(np.linspace(0, len(y) - 1, most).astype(np.int64))
    medians = [_median(y[i - min(i, half) : i + min(i, half) + 1]) for i in at]
    return x[at], np.array(medians)


def _median(values: Curve) -> float:
    there = values[~np.isnan(values)]
    return float(np.median(there)) if len(there) else math.nan
