"""Random numbers of a row: a pure function of its key, by a counter-based generator."""

from collections.abc import Iterable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def row_draws(keys: Iterable[int], count: int) -> Array:
    """Draw `count` numbers in [0, 1) for each of B keys, float64 (B, count).

    Philox (Salmon et al. 2011). Its raw words are the same in every NumPy.
    """
    words = [np.random.Philox(key=int(key) & (1 << 64) - 1).random_raw(count) for key in keys]
    # The 53 bits that a float64 holds.
    return (np.array(words, np.uint64).reshape(-1, count) >> np.uint64(11)) * 2.0**-53
