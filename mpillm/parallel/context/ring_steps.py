"""The steps of ring attention as data: whose keys a rank attends to, and with which queries.

With the chunks of zigzag.py every step of causal attention is half of a square of queries and keys:
the diagonal, all queries with the first chunk of an earlier rank, or the second chunk's queries
with all keys of a later rank. Pure functions, without torch and MPI.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RingStep:
    """The attention of a rank to the keys and values of one rank, `source`."""

    source: int
    queries: tuple[int, ...]
    """Which of the rank's own two chunks, 0 and 1, attend."""
    keys: tuple[int, ...]
    """Which chunks of the source they attend to."""
    causal: bool
    """Whether the two are the same positions, of which none attends to a later one."""


def step_of(rank: int, source: int, causal: bool = True) -> RingStep:
    """Return the step of `rank` with the keys of `source`; without `causal` all attend to all."""
    if not causal or rank == source:
        return RingStep(source, (0, 1), (0, 1), causal)
    if source < rank:
        return RingStep(source, (0, 1), (0,), False)
    return RingStep(source, (1,), (0, 1), False)


def sources_of(rank: int, nodes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return whose keys `rank` reads, in order: a list for each node whose keys visit its own.

    `nodes`: the ranks of each node, equally many. Keys of a node pass on to the next node's ranks
    of the same place; within a node they are read where they are. In each step the ranks of a node
    read, and add to, different rows.
    """
    node, place = place_of(rank, nodes)
    count = len(nodes[node])
    return [
        [nodes[(node - turn) % len(nodes)][(place - step) % count] for step in range(count)]
        for turn in range(len(nodes))
    ]


def place_of(rank: int, nodes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the node of a rank, and its place among the node's ranks."""
    return next(
        (node, list(ranks).index(rank)) for node, ranks in enumerate(nodes) if rank in ranks
    )


def chunk_pairs(rank: int, ranks: int, step: RingStep) -> Iterator[tuple[int, int, bool]]:
    """Yield the chunks of queries and keys of a step, and whether they are one chunk, causal."""
    queries, keys = (rank, 2 * ranks - 1 - rank), (step.source, 2 * ranks - 1 - step.source)
    for query in step.queries:
        for key in step.keys:
            if not step.causal or queries[query] >= keys[key]:
                yield queries[query], keys[key], step.causal and queries[query] == keys[key]
