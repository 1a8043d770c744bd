"""Is a schedule whole, and can it run? Every fault is told with its place.

`check` looks at a schedule as its rows stand; `programs` weaves in the messages, and `run_blocking` plays them with
sends that wait, knowing nothing of the schedule: the second proof beside the first.
"""

from itertools import product

from mpillm.errors import LayoutError
from mpillm.parallel.blocking import Step, programs, run_blocking
from mpillm.parallel.pipeline.actions import Action, Kind, PipelineSchedule
from mpillm.parallel.pipeline.order import execution_order

__all__ = ["Step", "ascending", "check", "programs", "run_blocking"]


def check(schedule: PipelineSchedule, forward_only: bool = False) -> None:
    """Raise LayoutError with the first fault of `schedule`; one that is `forward_only` needs no backwards.

    Each stage lies on one rank. Each stage does one F with each microbatch, then B, or I and later W. The messages
    between two stages are sent in the order in which they are used. The ranks never wait in a circle.
    """
    fault = (
        _placement_fault(schedule)
        or _count_fault(schedule, forward_only)
        or _row_fault(schedule)
        or _message_fault(schedule)
    )
    if fault:
        raise LayoutError(f"{schedule.name}: {fault}")
    execution_order(schedule)


def ascending(schedule: PipelineSchedule) -> bool:
    """Whether each stage goes through the microbatches from 0 up, forwards and in what makes weight gradients (B, W).

    Then gradients are summed in the same order by whichever schedule.
    """
    last: dict[tuple[int, bool], int] = {}
    for row in schedule.rows:
        for action in row:
            if action.kind != "I":
                key = (action.stage, action.kind == "F")
                if action.microbatch < last.get(key, 0):
                    return False
                last[key] = action.microbatch
    return True


def _placement_fault(schedule: PipelineSchedule) -> str:
    holders: dict[int, int] = {}
    for rank, row in enumerate(schedule.rows):
        if not row:
            return f"rank {rank} does nothing; each rank holds at least one stage, so give it one or use fewer ranks"
        for action in row:
            if not (
                0 <= action.stage < schedule.stages
                and 0 <= action.microbatch < schedule.microbatches
            ):
                return (
                    f"rank {rank} has {action}, but stages go from 0 to {schedule.stages - 1} and microbatches to "
                    f"{schedule.microbatches - 1}; take it out"
                )
            if holders.setdefault(action.stage, rank) != rank:
                return (
                    f"stage {action.stage} lies on rank {holders[action.stage]} and on rank {rank} (with {action}); "
                    "a stage has one rank, so move its actions to one row"
                )
    # Stages may be many where few have actions: the first gap is never far.
    missing = next((stage for stage in range(schedule.stages) if stage not in holders), None)
    return (
        ""
        if missing is None
        else f"stage {missing} of {schedule.stages} lies on no rank; give its actions a row"
    )


def _count_fault(schedule: PipelineSchedule, forward_only: bool) -> str:
    for rank, row in enumerate(schedule.rows):
        for index, action in enumerate(row):
            if schedule.places[action] != (rank, index):
                return f"rank {rank} has {action} twice; take one out"
    places = schedule.places
    # Not itertools.product: a file that names microbatch 999999999 would have it list them all.
    for stage, microbatch in (
        (s, m) for s in range(schedule.stages) for m in range(schedule.microbatches)
    ):
        found = "".join(kind for kind in _KINDS if Action(stage, kind, microbatch) in places)
        if found not in (("F",) if forward_only else ("FB", "FIW")):
            what = "F" if forward_only else "F, and B or both I and W"
            return (
                f"stage {stage} needs {what} with microbatch {microbatch}, and has "
                f"{', '.join(found) or 'nothing'} on rank {schedule.rank_of[stage]}; each comes once"
            )
    return ""


_KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")


def _row_fault(schedule: PipelineSchedule) -> str:
    """F comes before all else of its stage and microbatch, I before W."""
    places = schedule.places
    for action, (rank, index) in places.items():
        before = Action(action.stage, "I" if action.kind == "W" else "F", action.microbatch)
        if action.kind != "F" and places[before][1] > index:
            return f"rank {rank} has {action} before {before}, which it is computed from; swap them"
    return ""


def _message_fault(schedule: PipelineSchedule) -> str:
    """Each way between two stages on two ranks is a channel whose messages come out in the order they went in."""
    orders: dict[tuple[int, bool], list[Action]] = {}
    for row in schedule.rows:
        for action in row:
            if action.kind != "W":
                orders.setdefault((action.stage, action.kind == "F"), []).append(action)
    for stage, forwards in product(range(schedule.stages - 1), (True, False)):
        sender, receiver = (stage, stage + 1) if forwards else (stage + 1, stage)
        if schedule.rank_of[sender] == schedule.rank_of[receiver]:
            continue
        for sent, used in zip(
            orders.get((sender, forwards), ()), orders.get((receiver, forwards), ()), strict=True
        ):
            if sent.microbatch != used.microbatch:
                return (
                    f"messages from stage {sender} to stage {receiver} arrive in the order in which they are sent, but "
                    f"rank {schedule.rank_of[sender]} does {sent} where rank {schedule.rank_of[receiver]} does {used}; "
                    "give both the same order of microbatches"
                )
    return ""
