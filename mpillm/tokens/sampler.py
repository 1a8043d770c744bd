"""Batches for training: the windows of a step, read for this rank's rows alone."""

import time
from typing import Any

import numpy as np

from mpillm.tokens.order import WindowOrder
from mpillm.tokens.reader import TokenReader
from mpillm.tokens.windows import ReadPlan, Windows

# Planning in NumPy is cheap by the thousand and dear by the dozen.
PLANNED_SAMPLES = 4096
KEPT_PLANS = 64
# A warm read of a window takes some 2 µs, one that waits for a disk a hundred: above this, asking ahead pays.
COLD_SECONDS = 30e-6
# Read-ahead hides how slow reads would be without it, so now and then a step does without.
TRIAL_STEPS = 64


class Sampler:
    """The samples of a training run, in the order that (seed, step) alone decide."""

    def __init__(
        self,
        reader: TokenReader,
        context: int,
        global_batch: int,
        seed: int,
        readahead: bool | None = None,
        boundaries: bool = True,
    ) -> None:
        """`readahead`: ask the kernel for the next step's windows; None asks when reads are found to be slow.

        `boundaries`: tell where documents end in each window. Raises DataError when there isn't one whole window.
        """
        self.reader, self.context, self.global_batch = reader, context, global_batch
        self.order = WindowOrder(reader.n_tokens, context, seed)
        self.readahead, self.boundaries = readahead, boundaries
        self._slow = False
        self._plans: dict[tuple[int, int, int], ReadPlan] = {}

    def windows(
        self, step: int, first: int, count: int, out: np.ndarray[Any, np.dtype[Any]] | None = None
    ) -> Windows:
        """The samples at positions `first` … `first` + `count` - 1 of the global batch of `step`.

        Fills `out` (count, context + 1) of the reader's dtype, or a new array. Any rank may call it for any rows, in
        any order; a rank that asks for the same rows at each step is served from one plan.
        """
        assert 0 <= first < first + count <= self.global_batch
        if out is None:
            out = np.empty((count, self.context + 1), self.reader.dtype)
        plan, row = self._plan(step, first, count)
        begun = time.perf_counter()
        plan.fetch(row, out)
        if self._ask_ahead(step, (time.perf_counter() - begun) / max(1, count)):
            ahead, its_row = self._plan(step + 1, first, count)
            ahead.advise(its_row, count)
        return plan.windows(row, out)

    def _plan(self, step: int, first: int, count: int) -> tuple[ReadPlan, int]:
        """The plan that holds the rows of this step, and which of its rows is the first of them."""
        steps = -(-PLANNED_SAMPLES // max(1, count))
        block = step // steps
        key = (block, first, count)
        if key not in self._plans:
            if len(self._plans) >= KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
            positions = np.arange(first, first + count, dtype=np.int64)
            ids = (
                np.arange(block * steps, (block + 1) * steps, dtype=np.int64)[:, None]
                * self.global_batch
                + positions
            )
            starts = self.order.starts(ids.reshape(-1))
            self._plans[key] = ReadPlan(self.reader, starts, self.context + 1, self.boundaries)
        return self._plans[key], (step - block * steps) * count

    def _ask_ahead(self, step: int, seconds_per_window: float) -> bool:
        if self.readahead is not None:
            return self.readahead
        if step % TRIAL_STEPS == 0:
            self._slow = False
        elif not self._slow:
            self._slow = seconds_per_window > COLD_SECONDS
        return self._slow
