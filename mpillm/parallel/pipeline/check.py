"""Is a schedule complete, and can it run? Every fault is reported with its place.

The tests compare with a second proof, which plays the rows with sends that block.
"""

from itertools import product
from typing import get_args

from mpillm.errors import LayoutError
from mpillm.parallel.pipeline.actions import Action, Kind, PipelineSchedule
from mpillm.parallel.pipeline.execution_order import execution_order


def check(schedule: PipelineSchedule, forward_only: bool = False) -> None:
    """Raise LayoutError with the first fault of `schedule`; with `forward_only` it has F alone.

    Each stage is on one rank. Each stage does one F with each microbatch, then B, or I and later W.
    Messages between two stages are sent in the order in which they are used. No ranks wait for one
    another in a cycle.
    """
    # In this order: each function relies on what the ones before it have established.
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
    """Return whether each stage takes the microbatches from 0 up, in F and in B or W.

    Weight gradients are then summed in the same order by every schedule: I makes none.
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
    """Describe an idle rank, an action out of range, or a stage on no rank or on two."""
    holders: dict[int, int] = {}
    for rank, row in enumerate(schedule.rows):
        if not row:
            return (
                f"rank {rank} does nothing; each rank holds at least one stage, "
                "so give it one or use fewer ranks"
            )
        for action in row:
            if not (
                0 <= action.stage < schedule.stages
                and 0 <= action.microbatch < schedule.microbatches
            ):
                return (
                    f"rank {rank} has {action}, but stages go from 0 to {schedule.stages - 1} "
                    f"and microbatches to {schedule.microbatches - 1}; take it out"
                )
            if holders.setdefault(action.stage, rank) != rank:
                return (
                    f"stage {action.stage} is on rank {holders[action.stage]} and on rank {rank} "
                    f"(with {action}); a stage has one rank, so move its actions to one row"
                )
    # A generator, not a list: a file may name stage 999999999, and the first gap is never far.
    missing = next((stage for stage in range(schedule.stages) if stage not in holders), None)
    if missing is None:
        return ""
    return f"stage {missing} of {schedule.stages} is on no rank; give its actions a row"


def _count_fault(schedule: PipelineSchedule, forward_only: bool) -> str:
    """Describe an action that is repeated, or a stage and microbatch that lack or repeat a kind."""
    places = schedule.places
    for rank, row in enumerate(schedule.rows):
        for index, action in enumerate(row):
            # `places` keeps the last of two equal actions.
            if places[action] != (rank, index):
                return f"rank {rank} has {action} twice; take one out"
    # Not itertools.product, which would list all microbatches of a file that names 999999999.
    for stage, microbatch in (
        (s, m) for s in range(schedule.stages) for m in range(schedule.microbatches)
    ):
        kinds = [kind for kind in get_args(Kind) if Action(stage, kind, microbatch) in places]
        found = "".join(kinds)
        if found not in (("F",) if forward_only else ("FB", "FIW")):
            what = "F" if forward_only else "F, and B or both I and W"
            return (
                f"stage {stage} needs {what} with microbatch {microbatch}, and has "
                f"{', '.join(found) or 'nothing'} on rank {schedule.rank_of[stage]}; "
                "each comes once"
            )
    return ""


def _row_fault(schedule: PipelineSchedule) -> str:
    """Describe an action that comes before its own F, or W before I."""
    places = schedule.places
    for action, (rank, index) in places.items():
        before = Action(action.stage, "I" if action.kind == "W" else "F", action.microbatch)
        if action.kind != "F" and places[before][1] > index:
            return f"rank {rank} has {action} before {before}, which it is computed from; swap them"
    return ""


def _message_fault(schedule: PipelineSchedule) -> str:
    """Describe two stages that use microbatches in different orders across a channel."""
    # A channel keeps its messages in the order of the sends and gives them no names: the receiver
    # knows a message by its place alone.
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
                    f"messages from stage {sender} to stage {receiver} arrive in the order in "
                    f"which they are sent, but rank {schedule.rank_of[sender]} does {sent} where "
                    f"rank {schedule.rank_of[receiver]} does {used}; "
                    "give both the same order of microbatches"
                )
    return ""
