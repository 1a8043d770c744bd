"""Print a pipeline schedule: its chart and figures, or a comparison of all schedules."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import rich.console
from rich.text import Text

from mpillm.errors import LayoutError, UsageError
from mpillm.parallel.pipeline.actions import PipelineSchedule
from mpillm.parallel.pipeline.gantt import gantt_picture, gantt_text
from mpillm.parallel.pipeline.schedule_catalog import MOST_ACTIONS, SCHEDULES, make_schedule
from mpillm.parallel.pipeline.schedule_csv import write_schedule
from mpillm.parallel.pipeline.simulate import Costs, Timeline, simulate
from mpillm.system.atomic import check_outputs, is_special, write_text
from mpillm.system.command_line import Argument, Json, Option
from mpillm.system.console import Console
from mpillm.system.json_text import to_json
from mpillm.system.messages import explain
from mpillm.system.plugins import is_plugin

ALL = "all"
# Sums of costs stay exact enough to draw.
LEAST_COST, MOST_COST = 1e-9, 1e9
# A picture of more ranks is larger than its library can draw.
MOST_DRAWN_RANKS = 512


@dataclass(frozen=True)
class ScheduleOptions:
    """The options of `mpillm schedule`."""

    name: Annotated[
        str,
        Argument(
            f"{', '.join(SCHEDULES)}, a .csv file, package.module:Name, or all: a comparison.",
            metavar="NAME",
        ),
    ]
    ranks: Annotated[
        int,
        Option(
            "Ranks of the pipeline; 0: as a .csv file has.",
            metavar="P",
            minimum=0,
            maximum=MOST_ACTIONS,
        ),
    ] = 0
    microbatches: Annotated[
        int,
        Option(
            "Microbatches; 0: as a .csv file has.", metavar="M", minimum=0, maximum=MOST_ACTIONS
        ),
    ] = 0
    chunks: Annotated[
        int,
        Option(
            "Stages a rank; 0: as is usual for the schedule.",
            metavar="V",
            minimum=0,
            maximum=MOST_ACTIONS,
        ),
    ] = 0
    costs: Annotated[
        str,
        Option(
            "Time of a rank's forward, of the input half and the weights half of its backward, "
            "and of a message.",
            metavar="F,B,W,T",
        ),
    ] = "1,1,1,0"
    svg: Annotated[Path | None, Option("Draw the chart.", metavar="FILE.svg")] = None
    png: Annotated[Path | None, Option("Draw the chart.", metavar="FILE.png")] = None
    csv: Annotated[Path | None, Option("Write the schedule, a row a rank.", metavar="FILE.csv")] = (
        None
    )
    as_json: Json = False
    width: int = 120
    """Columns of the terminal."""
    coloured: bool = False


@dataclass(frozen=True)
class ShareCosts:
    """Times of a rank's whole share of the model with one microbatch, in any unit."""

    forward: float
    backward_input: float
    backward_weight: float
    transfer: float

    @classmethod
    def parse(cls, text: str) -> "ShareCosts":
        """Parse F,B,W,T, such as `1,1,1,0`. Raises UsageError."""
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if (
            len(numbers) != 4
            or not all(n == 0 or LEAST_COST <= n <= MOST_COST for n in numbers)
            or not any(numbers[:3])
        ):
            raise UsageError(
                f"--costs takes F,B,W,T, four numbers from 0 up to {MOST_COST:g}, where not 0 at "
                f"least {LEAST_COST:g}, and not {text[:60]!r}: the times of a forward, of the "
                "input half and the weights half of a backward, and of a message, such as 1,1,1,0"
            )
        return cls(*numbers)

    def of_stages(self, schedule: PipelineSchedule) -> Costs:
        """Give each stage its part of a rank's share."""
        # Schedules with one and with several stages a rank then compute the same model.
        part = schedule.ranks / schedule.stages
        halves = (self.backward_input * part, self.backward_weight * part)
        return Costs.even(schedule.stages, self.forward * part, *halves, self.transfer)


def print_schedule(options: ScheduleOptions, console: Console) -> None:
    """Print the chart and figures of a schedule, or compare all; write the files of the options.

    Raises UsageError and LayoutError.
    """
    costs = ShareCosts.parse(options.costs)
    known = options.name in (ALL, *SCHEDULES) or is_plugin(options.name)
    if known and not (options.ranks and options.microbatches):
        raise UsageError(
            f"{options.name} needs --ranks P and --microbatches M; "
            "only a .csv file has its own numbers"
        )
    if options.name == ALL:
        _compare(options, costs, console)
        return
    schedule = make_schedule(options.name, options.ranks, options.microbatches, options.chunks)
    timeline = simulate(schedule, costs.of_stages(schedule))
    # Written before the first line is printed: where a file fails, the error is printed alone.
    written = _write_files(options, schedule, timeline)
    if options.as_json:
        console.write(
            to_json(schedule_figures(schedule, timeline) | {"costs": asdict(costs)}) + "\n"
        )
        return
    console.write(_as_text(gantt_text(timeline, schedule, options.width), options))
    console.facts(f"{schedule.name}: {_size(schedule)}", _printed_figures(schedule, timeline))
    for path in written:
        console.say(f"wrote {path}")


def schedule_figures(schedule: PipelineSchedule, timeline: Timeline) -> dict[str, Any]:
    """Return the figures of a schedule as plain values; times in the unit of the costs."""
    held = [len(schedule.stages_of(rank)) for rank in range(schedule.ranks)]
    # Over a rank's number of stages, `peaks` are shares of the model, which compare.
    return {
        "schedule": schedule.name,
        "ranks": schedule.ranks,
        "chunks": schedule.chunks,
        "microbatches": schedule.microbatches,
        "makespan": timeline.makespan,
        "ideal": sum(timeline.busy) / schedule.ranks,
        "bubble": timeline.bubble,
        "busy": timeline.busy,
        "peaks": [peak / chunks for peak, chunks in zip(timeline.peaks, held, strict=True)],
        "messages": sum(
            schedule.target(action) is not None for row in schedule.rows for action in row
        ),
    }


def _size(schedule: PipelineSchedule) -> str:
    return f"{schedule.ranks} ranks, {schedule.stages} stages, {schedule.microbatches} microbatches"


def _printed_figures(schedule: PipelineSchedule, timeline: Timeline) -> dict[str, str]:
    found = schedule_figures(schedule, timeline)
    peaks = ", ".join(_rounded(peak) for peak in found["peaks"])
    return {
        "makespan": _rounded(found["makespan"]),
        "ideal": f"{_rounded(found['ideal'])} (computing alone, the mean of the ranks)",
        "bubble": f"{found['bubble']:.1%} (makespan over ideal, less 1)",
        "stored at most": f"{peaks} (rank by rank: microbatches' activations of a rank's whole "
        "share of the model)",
        "messages": f"{found['messages']:,} a step",
    }


def _compare(options: ScheduleOptions, costs: ShareCosts, console: Console) -> None:
    if options.svg or options.png or options.csv:
        raise UsageError(
            "a file holds one schedule: name one instead of all for --svg, --png or --csv"
        )
    # A schedule that cannot take these numbers is left out with its reason, the others compare.
    found, left_out = [], {}
    for name in SCHEDULES:
        try:
            schedule = make_schedule(name, options.ranks, options.microbatches, options.chunks)
        except LayoutError as failure:
            left_out[name] = str(failure)
        else:
            found.append(schedule_figures(schedule, simulate(schedule, costs.of_stages(schedule))))
    if options.as_json:
        console.write(
            to_json({"schedules": found, "left_out": left_out, "costs": asdict(costs)}) + "\n"
        )
        return
    console.table(
        f"{options.ranks} ranks, {options.microbatches} microbatches",
        ["schedule", "stages a rank", "makespan", "bubble", "stored at most", "messages"],
        [
            [
                row["schedule"],
                str(row["chunks"]),
                _rounded(row["makespan"]),
                f"{row['bubble']:.1%}",
                _rounded(max(row["peaks"])),
                f"{row['messages']:,}",
            ]
            for row in found
        ],
    )
    for name, reason in left_out.items():
        console.say(f"left out: {reason if reason.startswith(name) else f'{name}: {reason}'}")


def _write_files(
    options: ScheduleOptions, schedule: PipelineSchedule, timeline: Timeline
) -> list[Path]:
    """Write the files of the options and return them. Raises UsageError where that fails."""
    # All are checked before the first file is written.
    for option, path in (("svg", options.svg), ("png", options.png)):
        if path is None:
            continue
        if path.suffix != f".{option}" and not is_special(path):
            raise UsageError(f"--{option} takes the name of a .{option} file, not {path}")
        if schedule.ranks > MOST_DRAWN_RANKS:
            raise UsageError(
                f"--{option} draws at most {MOST_DRAWN_RANKS} ranks, and {schedule.name} has "
                f"{schedule.ranks:,}; leave it out"
            )
    named = {"--svg": options.svg, "--png": options.png, "--csv": options.csv}
    written = check_outputs(named, make_folders=False)
    for path in written:
        try:
            if path is options.csv:
                write_text(path, write_schedule(schedule))
            else:
                gantt_picture(timeline, schedule, path, "svg" if path is options.svg else "png")
        except OSError as failure:
            raise UsageError(f"cannot write {explain(failure, path)}") from failure
    return written


def _as_text(lines: Sequence[Text], options: ScheduleOptions) -> str:
    """Render lines with colours, or without, whatever stdout is: rank 0's console writes them."""
    paper = io.StringIO()
    pen = rich.console.Console(
        file=paper, force_terminal=options.coloured, highlight=False, soft_wrap=True
    )
    for line in lines:
        pen.print(line)
    return paper.getvalue()


def _rounded(number: float) -> str:
    return f"{number:,.6g}"
