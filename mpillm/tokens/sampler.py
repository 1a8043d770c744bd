"""Batches for training: the windows of a step, read for this rank's rows alone."""

import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.tokens.order import WindowOrder, task_keys
from mpillm.tokens.windows import ReadPlan, Windows

if TYPE_CHECKING:
    from mpillm.tokens.reader import TokenReader

# NumPy plans thousands of windows in about the time of a dozen.
PLANNED_SAMPLES = 4096
# A rank that asks for the same rows at each step needs two: this block of steps and the next.
KEPT_PLANS = 64
# A warm read of a window takes some 2 µs, one that waits for a disk 100 µs: reading ahead pays.
COLD_SECONDS = 30e-6
# Read-ahead hides how slow reads are without it, so one step in 64 goes without.
TRIAL_STEPS = 64


class Sampler:
    """The samples of a training run, in the order that (seed, step) alone decide."""

    def __init__(
        self,
        reader: "TokenReader",
        context: int,
        global_batch: int,
        seed: int,
        readahead: bool | None = None,
        boundaries: bool = True,
    ) -> None:
        """Order the windows of `reader` of `context` + 1 tokens.

        `readahead`: ask the kernel for the next step's windows; None asks while reads are slow.
        `boundaries`: find the document ends of each window. Raises DataError when the split is
        shorter than one window.
        """
        self.reader, self.context, self.global_batch = reader, context, global_batch
        self.seed = seed
        self.order = WindowOrder(reader.n_tokens, context, seed)
        self.readahead, self.boundaries = readahead, boundaries
        self._reads_are_slow = False
        self._plan_of_block = lru_cache(KEPT_PLANS)(self._make_plan)

    def windows(
        self, step: int, first: int, count: int, out: np.ndarray[Any, np.dtype[Any]] | None = None
    ) -> Windows:
        """Read the samples at positions `first` … `first` + `count` - 1 of the batch of `step`.

        Fills `out` (count, context + 1) of the reader's dtype, or a new array. Any rank may call
        it for any rows, in any order. Raises DataError.
        """
        assert 0 <= first < first + count <= self.global_batch
        if out is None:
            out = np.empty((count, self.context + 1), self.reader.dtype)
        # Plans hold blocks of steps.
        steps = -(-PLANNED_SAMPLES // count)
        block, row = divmod(step, steps)
        plan = self._plan_of_block(block, first, count)
        begun = time.perf_counter()
        windows = plan.fetch(row * count, out)
        if self.readahead is None:
            slow = (time.perf_counter() - begun) / count > COLD_SECONDS
            self._reads_are_slow = step % TRIAL_STEPS != 0 and (self._reads_are_slow or slow)
        if self._reads_are_slow if self.readahead is None else self.readahead:
            block, row = divmod(step + 1, steps)
            self._plan_of_block(block, first, count).advise(row * count, count)
        return windows

    def raw(self, step: int, first: int, count: int) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
        """Read what `windows` reads as arrays by name, with a key of each row."""
        ids = step * self.global_batch + np.arange(first, first + count, dtype=np.int64)
        raw = self.windows(step, first, count).fields(self.boundaries)
        return {**raw, "keys": task_keys(self.seed, ids)}

    def _make_plan(self, block: int, first: int, count: int) -> ReadPlan:
        """Plan the same rows of each step of a block of steps."""
        steps = -(-PLANNED_SAMPLES // count)
        numbers = np.arange(block * steps, (block + 1) * steps, dtype=np.int64)
        positions = np.arange(first, first + count, dtype=np.int64)
        ids = numbers[:, None] * self.global_batch + positions
        starts = self.order.starts(ids.reshape(-1))
        return ReadPlan(self.reader, starts, self.context + 1, self.boundaries)
