"""Find an order in which all ranks' actions can run, or the cycle that shows why there is none."""

from collections import deque
from dataclasses import dataclass

from mpillm.errors import LayoutError
from mpillm.parallel.pipeline.actions import Action, PipelineSchedule


@dataclass(frozen=True)
class BlockedRank:
    """`rank` cannot do `action` before `holder` has done `needed`."""

    rank: int
    action: Action
    needed: Action
    holder: int


def execution_order(schedule: PipelineSchedule) -> list[tuple[int, Action]]:
    """List (rank, action) of all actions: a topological order of rows and of what actions need.

    Raises LayoutError with the cycle when the ranks deadlock.
    """
    heads = [0] * schedule.ranks
    order: list[tuple[int, Action]] = []
    done: set[Action] = set()
    # Blocked ranks by the action that they need, so that each action is examined twice or less: the
    # time is linear in the number of actions.
    blocked: dict[Action, list[int]] = {}
    runnable = deque(range(schedule.ranks))
    while runnable:
        rank = runnable.popleft()
        row = schedule.rows[rank]
        while heads[rank] < len(row):
            action = row[heads[rank]]
            needed = schedule.needs(action)
            if needed is not None and needed not in done:
                blocked.setdefault(needed, []).append(rank)
                break
            done.add(action)
            order.append((rank, action))
            heads[rank] += 1
            runnable.extend(blocked.pop(action, ()))
    if blocked:
        cycle = describe_cycle(blocked_ranks(schedule, heads))
        raise LayoutError(f"{schedule.name}: a deadlock: {cycle}; move one of them in its row")
    return order


def blocked_ranks(schedule: PipelineSchedule, heads: list[int]) -> dict[int, BlockedRank]:
    """Map each rank that is blocked at `heads[rank]` of its row to what it waits for.

    Raises LayoutError where a needed action is in no row.
    """
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
            found[rank] = BlockedRank(rank, action, needed, schedule.places[needed][0])
    return found


def describe_cycle(blocked: dict[int, BlockedRank]) -> str:
    """Describe a cycle of blocked ranks. There is one: each waits for a rank that waits too."""
    chain = [next(iter(blocked.values()))]
    while (following := blocked[chain[-1].holder]) not in chain:
        chain.append(following)
    # The start of the chain may be outside the cycle.
    chain = chain[chain.index(following) :]
    # Begin with the smallest rank: the message is then the same for equal cycles.
    start = chain.index(min(chain, key=lambda wait: wait.rank))
    first, *others = chain[start:] + chain[:start]
    text, previous = (
        f"rank {first.rank} cannot do {first.action} "
        f"before rank {first.holder} does {first.needed}",
        first,
    )
    for wait in others:
        if previous.needed != wait.action:
            text += f", which comes after {wait.action} there"
        text += f", which needs {wait.needed}"
        text += f" of rank {wait.holder}" if wait.holder != first.rank else ""
        previous = wait
    return f"{text}, which comes after {first.action} on rank {first.rank}"
