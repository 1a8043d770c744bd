"""Decide when a run stops before its last step: on a signal, or before its time is up.

Each rank adds its stop request to the exchange of losses that ends a step. So all ranks learn of it
at the same step, without another message. Rank 0 alone reads the clock.
"""

import time
from collections.abc import Sequence

from mpillm.launch.signals import StopSignals
from mpillm.system.console import clock
from mpillm.system.ending_signals import signal_name

# Values of a stop request that is not a signal number; no system has a signal 1000.
NO_REQUEST, TIME_IS_UP = 0, 1000
# Rank 0 no longer holds the run: all ranks leave without saving (loop.py).
LOCK_LOST = 1001
# Before the first save its duration is unknown: reserve this share of the remaining time for it,
# within bounds.
FIRST_SAVE_SHARE = 0.1
LEAST_SAVE_SECONDS, MOST_SAVE_SECONDS = 2.0, 60.0
# The next save or step may take twice as long as the longest so far: the file system is shared.
SAFETY_FACTOR = 2.0


def margin_seconds(left_seconds: float, save_seconds: float | None, step_seconds: float) -> float:
    """Return how long before its deadline a run must stop: time for one save and one more step.

    `left_seconds`: of the job when the run began. `save_seconds`, `step_seconds`: of the longest
    save (None: none yet) and of the longest step so far, its evaluation included.
    """
    if save_seconds is None:
        share = FIRST_SAVE_SHARE * left_seconds
        save = min(max(share, LEAST_SAVE_SECONDS), MOST_SAVE_SECONDS)
    else:
        save = LEAST_SAVE_SECONDS + SAFETY_FACTOR * save_seconds
    return save + SAFETY_FACTOR * step_seconds


class Stopping:
    """The stop request of this rank, and the reason for which all ranks stop."""

    def __init__(
        self, signals: StopSignals | None, deadline: float | None, save_seconds: float | None = None
    ) -> None:
        """Start the clock.

        `deadline`: the end of the job, in unix seconds; None on a rank that does not read the
        clock. `save_seconds`: the duration of the newest save of an earlier job.
        """
        self._signals, self._deadline = signals, deadline
        self._save_seconds = save_seconds
        self._step_seconds = 0.0
        self._started = time.time()

    def add_save_seconds(self, seconds: float) -> None:
        """Record the duration of a save."""
        self._save_seconds = max(seconds, self._save_seconds or 0.0)

    def add_step_seconds(self, seconds: float) -> None:
        """Record the duration of a step, its evaluation included and its save not."""
        self._step_seconds = max(self._step_seconds, seconds)

    def stop_request(self) -> int:
        """Return this rank's request at a step: a signal's number, TIME_IS_UP or NO_REQUEST."""
        if self._signals is not None and self._signals.number:
            return self._signals.number
        if self._deadline is None:
            return NO_REQUEST
        margin = margin_seconds(
            self._deadline - self._started, self._save_seconds, self._step_seconds
        )
        return TIME_IS_UP if time.time() + margin >= self._deadline else NO_REQUEST

    def stop_reason(self, requests: Sequence[int]) -> str:
        """Return in words why all ranks stop; "" where they continue.

        `requests`: by rank, the same on all of them, so that all decide alike. Rank 0's words
        count: the other ranks do not know the time.
        """
        # A signal has a person or a batch system as its cause, so it is reported first.
        asked = next(
            (
                rank
                for rank, request in enumerate(requests)
                if request not in (NO_REQUEST, TIME_IS_UP)
            ),
            None,
        )
        if asked is not None:
            return f"{signal_name(requests[asked])} on rank {asked}"
        return self._time_is_up() if TIME_IS_UP in requests else ""

    def _time_is_up(self) -> str:
        left = (self._deadline or 0.0) - time.time()
        end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._deadline or 0.0))
        return (
            f"the time limit is near: {clock(left)} to {end}"
            if left > 0
            else f"the time limit was over at {end}"
        )
