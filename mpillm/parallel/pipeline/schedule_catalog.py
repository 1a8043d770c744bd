"""The pipeline schedules by name, and how one is made for a number of ranks and microbatches."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mpillm.errors import LayoutError, UsageError
from mpillm.parallel.pipeline.actions import PipelineSchedule
from mpillm.parallel.pipeline.check import check
from mpillm.parallel.pipeline.schedule_csv import read_schedule
from mpillm.parallel.pipeline.schedule_rule import ActionRow, ScheduleRule
from mpillm.system.plugins import load_plugin

# Order of `mpillm schedule all`, and of its page: from the simplest to the smallest bubble.
SCHEDULES: Mapping[str, str] = MappingProxyType(
    {
        "gpipe": "mpillm.parallel.pipeline.schedules.gpipe:GPIPE",
        "1f1b": "mpillm.parallel.pipeline.schedules.one_f_one_b:ONE_F_ONE_B",
        "interleaved": "mpillm.parallel.pipeline.schedules.interleaved:INTERLEAVED",
        "zb-h1": "mpillm.parallel.pipeline.schedules.zb_h1:ZB_H1",
        "zb-v": "mpillm.parallel.pipeline.schedules.zb_v:ZB_V",
        "dualpipe-v": "mpillm.parallel.pipeline.schedules.dualpipe_v:DUALPIPE_V",
    }
)


# Beyond it a schedule takes gigabytes. 64 ranks × 2 chunks × 2,048 microbatches are below it.
MOST_ACTIONS = 1_000_000


def make_schedule(name: str, ranks: int, microbatches: int, chunks: int = 0) -> PipelineSchedule:
    """Make the schedule `name` for `ranks` ranks with `chunks` stages each; 0: its usual number.

    `name` is a key of SCHEDULES, a .csv file, or `package.module:Name` of a ScheduleRule. For a
    file, 0 ranks or microbatches mean the numbers of the file. A schedule of a file or a plug-in is
    checked. Raises LayoutError for an unknown name, and for numbers that the schedule cannot take.
    """
    if name.endswith(".csv"):
        return _fitting(read_schedule(Path(name)), ranks, microbatches, chunks)
    rule = _load_rule(name)
    chunks = chunks or rule.chunks
    _check_numbers(name, rule, ranks, microbatches, chunks)
    rows = []
    for rank in range(ranks):
        row = ActionRow(rule.stages_of(ranks, chunks, rank))
        rule.fill_row(row, ranks, microbatches, chunks, rank)
        rows.append(tuple(row.actions))
    schedule = PipelineSchedule(name, tuple(rows), ranks * chunks, microbatches)
    # The tests check the rules of the catalogue for every size; nothing has checked a plug-in.
    if name not in SCHEDULES:
        check(schedule)
    return schedule


def _load_rule(name: str) -> ScheduleRule:
    try:
        rule = load_plugin(name, SCHEDULES, "pipeline schedule")
    except UsageError as failure:
        raise LayoutError(f"{failure}; or name a .csv file") from failure
    if not isinstance(rule, ScheduleRule):
        raise LayoutError(
            f"the pipeline schedule {name} must be a ScheduleRule, not {type(rule).__name__}; "
            "make one as in mpillm/parallel/pipeline/schedules"
        )
    return rule


def _check_numbers(
    name: str, rule: ScheduleRule, ranks: int, microbatches: int, chunks: int
) -> None:
    if ranks < 1 or microbatches < 1:
        raise LayoutError(
            "a pipeline takes at least 1 rank and 1 microbatch, "
            f"not {ranks} and {microbatches}; give both"
        )
    if chunks < rule.chunks or (chunks > rule.chunks and not rule.more_chunks):
        number = f"{rule.chunks} stage{'s' * (rule.chunks > 1)} a rank"
        other = (
            "interleaved takes any number from 2 on"
            if chunks > 1
            else "gpipe, 1f1b and zb-h1 take 1"
        )
        raise LayoutError(
            f"{name} has {number}{' or more' * rule.more_chunks}, not {chunks}; "
            f"leave the number of chunks out, or: {other}"
        )
    # At most three kinds of action for each stage and microbatch.
    actions = 3 * ranks * chunks * microbatches
    if actions > MOST_ACTIONS:
        raise LayoutError(
            f"{name} of {ranks:,} ranks × {chunks:,} stages × {microbatches:,} microbatches has "
            f"{actions:,} actions, at most {MOST_ACTIONS:,} are made; give fewer microbatches"
        )
    # Below this number a V or a round cannot be filled: the rule would leave actions out.
    least = rule.microbatches_a_rank * ranks
    if microbatches < least:
        raise LayoutError(
            f"{name} on {ranks} ranks needs at least {least} microbatches, not {microbatches}; "
            "give more, or take 1f1b or zb-h1, which run with any number"
        )


def _fitting(
    schedule: PipelineSchedule, ranks: int, microbatches: int, chunks: int
) -> PipelineSchedule:
    """Return `schedule` if it has the numbers that were asked for; 0 asks for none."""
    for what, wanted, has in (
        ("ranks", ranks, schedule.ranks),
        ("microbatches", microbatches, schedule.microbatches),
        ("stages a rank", chunks, schedule.chunks),
    ):
        if wanted not in (0, has):
            raise LayoutError(
                f"{schedule.name} is a schedule of {has} {what}, not {wanted}; "
                f"ask for {has}, or for 0"
            )
    return schedule
