"""Record when each rank computed: the measured bubble, and a trace for Perfetto or Chrome."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from mpillm.comm.mesh import Mesh, coordinates
from mpillm.parallel.pipeline.actions import KINDS
from mpillm.parallel.pipeline.simulate import Costs, Span, simulate
from mpillm.parallel.step_plan import StepPlan
from mpillm.system.atomic import write_text
from mpillm.system.console import Console

# The newest steps whose spans are kept: some pages of a trace, and a bound on memory.
TRACED_STEPS = 32
# The first steps of a run touch memory and connections for the first time: not representative.
WARM_STEPS = 2


Event = tuple[str, float, float]
"""(name, begin, end), in seconds of one clock."""


class StepTrace:
    """The spans of this rank's steps.

    Every rank of `mesh` makes it, and calls its methods together with the others.
    """

    def __init__(self, mesh: Mesh, plan: StepPlan, clock_offset: float) -> None:
        """`clock_offset`: this rank's clock minus rank 0's, in seconds (comm/clock_sync.py)."""
        self._mesh, self._plan, self._offset = mesh, plan, clock_offset
        self._steps: list[list[Event]] = []
        self._bubbles: list[float] = []
        self._seconds: dict[tuple[int, str], list[float]] = {}

    def add(self, spans: Sequence[Span], others: Sequence[Event], bubble: float) -> None:
        """Add a step: its spans on the pipeline's stages, and what else the rank did.

        Times are seconds of this rank's clock. `bubble`: measured over all ranks.
        """
        events = [*((str(span.action), span.begin, span.end) for span in spans), *others]
        self._steps = [*self._steps[-TRACED_STEPS + 1 :], events]
        self._bubbles.append(bubble)
        if len(self._bubbles) > WARM_STEPS:
            for span in spans:
                key = (span.action.stage, span.action.kind)
                self._seconds.setdefault(key, []).append(span.end - span.begin)

    def print_bubble(self, console: Console) -> None:
        """Print the bubble as measured and as simulated with the stages' measured times."""
        schedule = self._plan.schedule
        own = {key: fmean(seconds) for key, seconds in self._seconds.items()}
        gathered: list[Mapping[tuple[int, str], float]] = self._mesh.comm.allgather(own)
        if schedule.ranks == 1 or not any(gathered):
            return
        costs = measured_costs(schedule.stages, gathered)
        rows = [
            ["measured, median of the steps", f"{median(self._bubbles[WARM_STEPS:]):.1%}"],
            [
                "simulated, with the stages' measured times",
                f"{simulate(schedule, costs).bubble:.1%}",
            ],
            ["simulated, with even stages", f"{self._plan.timeline.bubble:.1%}"],
        ]
        console.table(f"{schedule.name}: waiting over computing", ["", "bubble"], rows)

    def write_json(self, path: Path, console: Console) -> None:
        """Write the newest steps of all ranks as a trace in Chrome's format."""
        comm, offset = self._mesh.comm, self._offset
        own = [
            [(name, begin - offset, end - offset) for name, begin, end in step]
            for step in self._steps
        ]
        gathered: list[list[list[Event]]] | None = comm.gather(own)
        if gathered is None:
            return
        names = {
            rank: ", ".join(
                f"{axis} {place}" for axis, place in coordinates(rank, self._mesh.sizes).items()
            )
            for rank in range(comm.size)
        }
        events = trace_events(gathered, names, len(self._bubbles) - len(self._steps) + 1)
        write_text(path, json.dumps(events), plain=True)
        console.say(
            f"the last {len(self._steps)} steps: {path}, "
            "for https://ui.perfetto.dev or chrome://tracing"
        )


def measured_costs(stages: int, gathered: Iterable[Mapping[tuple[int, str], float]]) -> Costs:
    """Return the mean seconds by stage and kind of action, over the ranks that measured them.

    A backward pass that is not split counts as its input half.
    """
    found: dict[tuple[int, str], list[float]] = {}
    for part in gathered:
        for key, seconds in part.items():
            found.setdefault(key, []).append(seconds)
    mean = {key: fmean(seconds) for key, seconds in found.items()}

    def row(*kinds: str) -> tuple[float, ...]:
        """Return for each stage the mean of the first of `kinds` that was measured."""
        return tuple(
            next((mean[s, kind] for kind in kinds if (s, kind) in mean), 0.0) for s in range(stages)
        )

    return Costs(row("F"), row("I", "B"), row("W"))


def trace_events(
    gathered: Sequence[Sequence[Sequence[Event]]], names: Mapping[int, str], first_step: int
) -> dict[str, Any]:
    """Return a trace in the format of Chrome and Perfetto (Google, "Trace event format").

    Each rank is a track; times are in µs from the first event on. `gathered[rank][step]` has its
    events on one clock. `names`: the text that follows each rank's number.
    """
    zero = min((begin for steps in gathered for step in steps for _, begin, _ in step), default=0.0)
    events: list[dict[str, Any]] = [
        {
            "ph": "M",
            "pid": 0,
            "tid": rank,
            "name": "thread_name",
            "args": {"name": f"rank {rank} ({name})"},
        }
        for rank, name in names.items()
    ]
    for rank, steps in enumerate(gathered):
        for step, found in enumerate(steps, first_step):
            events += [
                {
                    "ph": "X",
                    "pid": 0,
                    "tid": rank,
                    "name": name,
                    "cat": KINDS.get(name.strip("0123456789"), "step"),
                    "ts": 1e6 * (begin - zero),
                    "dur": 1e6 * (end - begin),
                    "args": {"step": step},
                }
                for name, begin, end in found
            ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
