"""When a run stops before its last step: somebody asks, or its time is up.

Each rank brings a wish to every step's exchange of losses, so that all learn of it at the same step without a message
more; rank 0 alone looks at the clock.
"""

import time
from collections.abc import Sequence

from mpillm.launch.signals import StopSignals, signal_name
from mpillm.system.console import clock

NONE, TIME_IS_UP = 0, 1000
# Before the first checkpoint was written, this share of the time that is left may go into it, within bounds.
FIRST_SHARE = 0.1
LEAST_SECONDS, MOST_SECONDS = 2.0, 60.0
# What was once seen may take twice as long the next time: others write to the same file system.
CAUTION = 2.0


def margin_seconds(left_seconds: float, save_seconds: float | None, step_seconds: float) -> float:
    """How long before the end of its time a run should stop: for a save as long as the longest so far (None: of none
    is known), and one more step as long as the longest so far, its evaluation included.
    """
    if save_seconds is None:
        save = min(max(FIRST_SHARE * left_seconds, LEAST_SECONDS), MOST_SECONDS)
    else:
        save = LEAST_SECONDS + CAUTION * save_seconds
    return save + CAUTION * step_seconds


class Stopping:
    """The wish of this rank, and what all agreed on."""

    def __init__(
        self, signals: StopSignals | None, deadline: float | None, save_seconds: float | None = None
    ) -> None:
        """`deadline`: when the job ends, in unix seconds; None on a rank that does not look at the clock.
        `save_seconds`: of the newest save of an earlier job.
        """
        self._signals, self._deadline = signals, deadline
        self._save_seconds = save_seconds
        self._step_seconds = 0.0
        self._begun = time.time()

    def saved(self, seconds: float) -> None:
        self._save_seconds = max(seconds, self._save_seconds or 0.0)

    def stepped(self, seconds: float) -> None:
        """A step, and what belongs to it but its save, took so long."""
        self._step_seconds = max(self._step_seconds, seconds)

    def wish(self) -> int:
        """What this rank has to say at a step: a signal's number, TIME_IS_UP or NONE."""
        if self._signals is not None and self._signals.number:
            return self._signals.number
        if self._deadline is None:
            return NONE
        margin = margin_seconds(
            self._deadline - self._begun, self._save_seconds, self._step_seconds
        )
        return TIME_IS_UP if time.time() + margin >= self._deadline else NONE

    def reason(self, wishes: Sequence[int]) -> str:
        """Why all ranks stop, in words; "" where they go on, on all ranks or on none. `wishes`: by rank. Rank 0 has the
        words for all: the others do not know the time.
        """
        asked = next(
            (rank for rank, wish in enumerate(wishes) if wish not in (NONE, TIME_IS_UP)), None
        )
        if asked is not None:
            return f"{signal_name(wishes[asked])} on rank {asked}"
        return self._told_by_clock() if TIME_IS_UP in wishes else ""

    def _told_by_clock(self) -> str:
        left = (self._deadline or 0.0) - time.time()
        end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._deadline or 0.0))
        return (
            f"the time limit is near: {clock(left)} to {end}"
            if left > 0
            else f"the time limit was over at {end}"
        )
