"""The loss and the weight of a scored batch, summed over its rows."""

import numpy as np

from mpillm.parallel.pipeline.stage import BatchScore


def totals(score: BatchScore) -> tuple[float, float]:
    whole = np.zeros(score.rows.width)
    whole[score.rows.columns_U] = score.rows.values_BU.sum(0)
    return float(whole[0]), float(whole[1])
