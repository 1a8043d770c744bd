"""The pipeline schedules by name: for how many ranks, stages and microbatches each can be had.

What each does is in `schedule_rows.py`, with its source. Stage s lies on rank s mod p; in zb-v and dualpipe-v on a V
instead: down on rank s, and from stage p on back up on rank 2p−1−s.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from mpillm.errors import LayoutError
from mpillm.parallel.pipeline.actions import Action, PipelineSchedule
from mpillm.parallel.pipeline.schedule_csv import read_schedule
from mpillm.parallel.pipeline.schedules import (
    ActionRow,
    dualpipe_v,
    gpipe,
    interleaved,
    one_f_one_b,
    rounds,
    zb_h1,
    zb_v,
)


def make_schedule(name: str, ranks: int, microbatches: int, chunks: int = 0) -> PipelineSchedule:
    """The schedule `name` (one of NAMES, or a .csv file) for `ranks` ranks with `chunks` stages each; 0: as is usual.

    For a file, 0 ranks or microbatches mean as many as it has. Raises LayoutError for numbers that do not fit.
    """
    if name.endswith(".csv"):
        return _fitting(read_schedule(Path(name)), ranks, microbatches, chunks)
    form = _form(name)
    chunks = chunks or form.chunks
    _check_numbers(name, form, ranks, microbatches, chunks)
    rows = []
    for rank in range(ranks):
        row = ActionRow(
            [rank, 2 * ranks - 1 - rank]
            if form.v_shape
            else [rank + ranks * chunk for chunk in range(chunks)]
        )
        form.fill(row, ranks, microbatches, chunks, rank)
        rows.append(tuple(row.actions))
    return PipelineSchedule(name, tuple(rows), ranks * chunks, microbatches)


def forward_only(schedule: PipelineSchedule, microbatches: int) -> PipelineSchedule:
    """The forwards alone, of any number of microbatches, with each stage where `schedule` has it: for evaluation.

    Each rank takes, of what has come to it, the earliest round of microbatches, and of that the earliest stage. That
    keeps all ranks at work, while few microbatches lie waiting at a rank.
    """
    if microbatches < 1:
        raise LayoutError(
            f"a forward pass takes at least 1 microbatch, not {microbatches}; give more"
        )
    round_of = [
        number
        for number, size in enumerate(rounds(schedule.ranks, microbatches))
        for _ in range(size)
    ]
    arrived = [microbatches] + [0] * schedule.stages
    done = [0] * schedule.stages
    held = [schedule.stages_of(rank) for rank in range(schedule.ranks)]
    rows: list[list[Action]] = [[] for _ in schedule.rows]
    # Played in steps of one forward each; an order that was played cannot lock.
    while done[-1] < microbatches:
        waiting = [
            [(round_of[done[s]], s) for s in stages if done[s] < arrived[s]] for stages in held
        ]
        for row, stage in [
            (rows[rank], min(ready)[1]) for rank, ready in enumerate(waiting) if ready
        ]:
            row.append(Action(stage, "F", done[stage]))
            done[stage] += 1
            arrived[stage + 1] += 1
    return PipelineSchedule(
        f"{schedule.name} forward", tuple(map(tuple, rows)), schedule.stages, microbatches
    )


@dataclass(frozen=True)
class _Form:
    fill: Callable[[ActionRow, int, int, int, int], None]
    """Takes the row, p, m, v and r."""
    chunks: int = 1
    """Of a rank: so many, and no other number; with `more_chunks` so many or more."""
    more_chunks: bool = False
    v_shape: bool = False
    least: int = 0
    """Microbatches that each rank adds to the least number that the schedule takes."""


_FORMS: Mapping[str, _Form] = MappingProxyType(
    {
        "gpipe": _Form(gpipe),
        "1f1b": _Form(one_f_one_b),
        "interleaved": _Form(interleaved, chunks=2, more_chunks=True, least=1),
        "zb-h1": _Form(zb_h1),
        "zb-v": _Form(zb_v, chunks=2, v_shape=True, least=2),
        "dualpipe-v": _Form(dualpipe_v, chunks=2, v_shape=True, least=2),
    }
)

NAMES: tuple[str, ...] = tuple(_FORMS)


def _form(name: str) -> _Form:
    if name not in _FORMS:
        near = get_close_matches(name, NAMES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LayoutError(
            f"no pipeline schedule is called {name!r}; {hint}take {', '.join(NAMES)} or a .csv file"
        )
    return _FORMS[name]


def _check_numbers(name: str, form: _Form, ranks: int, microbatches: int, chunks: int) -> None:
    if ranks < 1 or microbatches < 1:
        raise LayoutError(
            f"a pipeline takes at least 1 rank and 1 microbatch, not {ranks} and {microbatches}; give both"
        )
    if chunks < form.chunks or (chunks > form.chunks and not form.more_chunks):
        rule = f"{form.chunks} stage{'s' * (form.chunks > 1)} a rank{' or more' * form.more_chunks}"
        other = (
            "interleaved takes any number from 2 on"
            if chunks > 1
            else "gpipe, 1f1b and zb-h1 take 1"
        )
        raise LayoutError(
            f"{name} has {rule}, not {chunks}; leave the number of chunks out, or: {other}"
        )
    if microbatches < form.least * ranks:
        raise LayoutError(
            f"{name} on {ranks} ranks needs at least {form.least * ranks} microbatches, not {microbatches}; give more, "
            "or take 1f1b or zb-h1, which run with any number"
        )


def _fitting(
    schedule: PipelineSchedule, ranks: int, microbatches: int, chunks: int
) -> PipelineSchedule:
    """`schedule`, if its numbers are those that were asked for; 0 asks for none."""
    held = max(len(schedule.stages_of(rank)) for rank in range(schedule.ranks))
    for what, wanted, has in (
        ("ranks", ranks, schedule.ranks),
        ("microbatches", microbatches, schedule.microbatches),
        ("stages a rank", chunks, held),
    ):
        if wanted not in (0, has):
            raise LayoutError(
                f"{schedule.name} is a schedule of {has} {what}, not {wanted}; ask for {has}, or for 0"
            )
    return schedule
