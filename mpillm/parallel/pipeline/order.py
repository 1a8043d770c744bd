"""One order in which all ranks' actions can be done, or the circle that shows why there is none."""

from collections import deque
from dataclasses import dataclass

from mpillm.errors import LayoutError
from mpillm.parallel.pipeline.actions import Action, PipelineSchedule


@dataclass(frozen=True)
class Wait:
    """`rank` stands before `action` until `holder` has done `needed`."""

    rank: int
    action: Action
    needed: Action
    holder: int


def execution_order(schedule: PipelineSchedule) -> list[tuple[int, Action]]:
    """(rank, action) of all actions, each behind those before it in its row and behind the one that it needs.

    Raises LayoutError with the circle, when the ranks would wait for one another for ever.
    """
    heads = [0] * schedule.ranks
    order: list[tuple[int, Action]] = []
    done: set[Action] = set()
    waiting: dict[Action, list[int]] = {}
    runnable = deque(range(schedule.ranks))
    while runnable:
        rank = runnable.popleft()
        row = schedule.rows[rank]
        while heads[rank] < len(row):
            action = row[heads[rank]]
            needed = schedule.needs(action)
            if needed is not None and needed not in done:
                waiting.setdefault(needed, []).append(rank)
                break
            done.add(action)
            order.append((rank, action))
            heads[rank] += 1
            runnable.extend(waiting.pop(action, ()))
    if waiting:
        raise LayoutError(
            f"{schedule.name}: a deadlock: {circle(waits(schedule, heads))}; move one of them in its row"
        )
    return order


def waits(schedule: PipelineSchedule, heads: list[int]) -> dict[int, Wait]:
    """Rank → what it waits for, of each rank that is stuck at `heads[rank]` of its row."""
    found = {}
    for rank, row in enumerate(schedule.rows):
        if heads[rank] < len(row):
            action = row[heads[rank]]
            needed = schedule.needs(action)
            assert needed is not None
            if needed not in schedule.places:
                raise LayoutError(
                    f"{schedule.name}: {action} on rank {rank} needs {needed}; give that to a rank"
                )
            found[rank] = Wait(rank, action, needed, schedule.places[needed][0])
    return found


def circle(stuck: dict[int, Wait]) -> str:
    """A circle of waiting ranks in words. There is one, since each waits for a rank that waits too."""
    chain = [next(iter(stuck.values()))]
    while (following := stuck[chain[-1].holder]) not in chain:
        chain.append(following)
    # The smallest rank begins, so that the words do not depend on who was asked first.
    chain = chain[chain.index(following) :]
    start = chain.index(min(chain, key=lambda wait: wait.rank))
    first, *others = chain[start:] + chain[:start]
    text, needed = (
        f"rank {first.rank} cannot do {first.action} before rank {first.holder} does {first.needed}",
        first,
    )
    for wait in others:
        if needed.needed != wait.action:
            text += f", which stands after {wait.action} there"
        text += f", which needs {wait.needed}" + (
            f" of rank {wait.holder}" if wait.holder != first.rank else ""
        )
        needed = wait
    return f"{text}, which stands after {first.action} on rank {first.rank}"
