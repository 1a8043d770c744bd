"""The bootstrap over rows: how often each replicate has a row, intervals, and p of a difference.

Each row is drawn a Poisson number of times (Hanley & MacGibbon 2006, "Creating non-parametric
bootstrap samples using Poisson frequencies"), a pure function of the seed and the row's number. So
ranks need no row of another one, and two models of the same rows have the same replicates.
"""

from math import exp, factorial

import numpy as np

from mpillm.tasks.metrics.metric import Array
from mpillm.tasks.row_draws import row_draws
from mpillm.tokens.order import task_keys

REPLICATES = 1000
# Rows that are drawn at once.
BLOCK = 256
# Another than 0, by which tasks draw in an evaluation.
SEED = 20
# A Poisson number above is drawn once in 10^11 times.
MOST_DRAWS = 13
CUMULATED = np.cumsum([exp(-1) / factorial(number) for number in range(MOST_DRAWS)])
SHARES = (0.025, 0.975)

Interval = tuple[float, float]


def draw_weights(numbers_B: Array, replicates: int, seed: int = SEED) -> Array:
    """Return how often each replicate has the rows with these numbers, float64 (R, B)."""
    chances = row_draws(task_keys(seed, numbers_B.astype(np.int64)), replicates)
    weights = np.zeros(chances.shape, np.uint8)
    for limit in CUMULATED:
        weights += chances >= limit
    return weights.T.astype(np.float64)


def draw_all(numbers_N: Array) -> Array:
    """Return how often each replicate has each of many rows, u1 (R, N), a byte for each.

    Drawn in blocks: of float64 they would take eight times as much.
    """
    blocks = [numbers_N[first : first + BLOCK] for first in range(0, len(numbers_N), BLOCK)]
    drawn = [draw_weights(numbers_B, REPLICATES).astype(np.uint8) for numbers_B in blocks]
    return np.concatenate(drawn, axis=1)


def percentile_interval(values: Array) -> Interval | None:
    """Return the 95% interval of a metric's values in the replicates, (R,).

    None where half of them have no value, as with a handful of rows.
    """
    known = values[np.isfinite(values)]
    if 2 * len(known) <= len(values):
        return None
    low, high = np.quantile(known, SHARES)
    return float(low), float(high)


def p_of_difference(found: float, differences: Array) -> float:
    """Return the two-sided p of a difference whose values in the paired replicates are (R,).

    The replicates are shifted to a mean of 0, as if both models were alike (Riezler & Maxwell 2005,
    and sacrebleu).
    """
    known = differences[np.isfinite(differences)]
    if not len(known) or not np.isfinite(found):
        return float("nan")
    beyond = np.abs(known - known.mean()) >= abs(found)
    return float((beyond.sum() + 1) / (len(known) + 1))
