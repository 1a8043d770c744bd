"""Batches for evaluation: every token but the first is a target exactly once, on any number of ranks."""

from typing import NamedTuple

import numpy as np

from mpillm.errors import DataError
from mpillm.tokens.reader import TokenReader
from mpillm.tokens.windows import ReadPlan, Windows


class EvaluationBatch(NamedTuple):
    """`rows` windows: row r is the tokens from `start` + r · `length` on, `length` inputs and one target more."""

    start: int
    rows: int
    length: int


def evaluation_batches(n_tokens: int, context: int, rows: int) -> list[EvaluationBatch]:
    """Cut `n_tokens` into windows of `context` inputs, `rows` of them a batch; what is left over is a batch of one row.

    Rank r of n takes [r::n]. Raises DataError when there is no target.
    """
    if n_tokens < 2:
        raise DataError(
            f"evaluation needs at least 2 tokens, one to read and one to foretell; the split has {n_tokens}"
        )
    windows, left = divmod(n_tokens - 1, context)
    batches = [
        EvaluationBatch(first * context, min(rows, windows - first), context)
        for first in range(0, windows, rows)
    ]
    return batches + ([EvaluationBatch(windows * context, 1, left)] if left else [])


def read_evaluation(reader: TokenReader, batch: EvaluationBatch) -> Windows:
    """The windows of a batch: tokens (rows, length + 1) and their document ends. Raises DataError."""
    starts = batch.start + np.arange(batch.rows, dtype=np.int64) * batch.length
    plan = ReadPlan(reader, starts, batch.length + 1)
    tokens_BT = np.empty((batch.rows, batch.length + 1), reader.dtype)
    plan.fetch(0, tokens_BT)
    return plan.windows(0, tokens_BT)
