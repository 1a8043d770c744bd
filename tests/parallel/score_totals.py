"""The loss and the weight of a scored batch, summed over its rows."""

from mpillm.parallel.pipeline.stage import BatchScore


def totals(score: BatchScore) -> tuple[float, float]:
    loss, weight, *_ = score.rows.table.sum(0).tolist()
    return loss, weight
