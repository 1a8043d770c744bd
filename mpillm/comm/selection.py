"""Which algorithm for which call: what can run, and which of those is fastest, by a cluster's profile or by a table.

The table holds what docs/notes.md measured; a profile that `mpillm bench … --save` wrote on the cluster knows better.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import inf
from types import MappingProxyType
from typing import Protocol

from mpillm.comm.algorithms.catalog import ALGORITHMS, FIXED_ORDER
from mpillm.comm.buffers import FLOATS, SHORT_FLOATS
from mpillm.errors import CommError

OPERATIONS = (
    "allreduce",
    "reduce_scatter",
    "allgather",
    "broadcast",
    "reduce",
    "alltoall",
    "barrier",
)
REDUCING = ("allreduce", "reduce_scatter", "reduce")
OPS = ("sum", "mean", "max", "min")
SHORT_INTEGERS = ("int8", "uint8", "int16", "uint16")
KIB, MIB = 1024, 1024 * 1024
# Measured in docs/notes.md. Below, between processes that share no memory, the library's own has the shortest latency.
FEW_BYTES = 64 * KIB
# From here on few rounds are worth less than few bytes.
FEW_ROUNDS_BYTES = 256 * KIB
# From here on our ring is faster within a node than the library's own.
RING_BYTES = 8 * MIB
# The library's all-gather and all-to-all are one call, whose counts end at 2³¹; all others are cut.
ONE_CALL = ("allgather", "alltoall")
ONE_CALL_BYTES = 1024 * MIB
# (algorithm, from so many bytes on, below so many), by library and operation: what beats the stage on private arrays of
# two ranks, because it copies once.
_OVER_STAGE: Mapping[str, Mapping[str, tuple[tuple[str, int, float], ...]]] = MappingProxyType(
    {
        "Open MPI": {
            "allreduce": (("native", 2 * MIB, RING_BYTES), ("ring", RING_BYTES, inf)),
            "allgather": (("native", 128 * KIB, ONE_CALL_BYTES),),
            "broadcast": (("native", 64 * KIB, inf),),
            "reduce": (("native", 128 * KIB, MIB),),
        },
        "MPICH": {
            "allreduce": (("ring", RING_BYTES, inf),),
            "allgather": (("ring", RING_BYTES, inf),),
        },
        "Intel": {
            "allreduce": (("native", 128 * KIB, 2 * MIB),),
            "allgather": (("native", 128 * KIB, ONE_CALL_BYTES),),
            "broadcast": (("native", 128 * KIB, inf),),
        },
    }
)


class Profile(Protocol):
    """What a cluster's profile answers; profile.py has it."""

    def best(
        self,
        operation: str,
        nbytes: int,
        element: str,
        nodes: int,
        ranks: int,
        allowed: Sequence[str],
        device: str = "cpu",
        node_shared: bool = False,
    ) -> str | None: ...


@dataclass(frozen=True)
class NodeMap:
    """How the ranks of a communicator lie on nodes."""

    nodes: tuple[tuple[int, ...], ...]
    """The ranks of each node, in order of their first rank."""
    shares_memory: bool
    """Whether the ranks of each node have a team in shared memory."""
    library: str = ""
    """The MPI library's name."""

    @property
    def size(self) -> int:
        return sum(len(ranks) for ranks in self.nodes)

    @property
    def on_one_node(self) -> bool:
        """Whether all ranks are on one node, be there shared memory or not."""
        return len(self.nodes) == 1

    @property
    def even(self) -> bool:
        """Whether all nodes have equally many ranks."""
        return len({len(ranks) for ranks in self.nodes}) == 1

    @property
    def two_level(self) -> bool:
        """Whether there is something to gain: several nodes, several ranks on one of them, and shared memory there."""
        return self.shares_memory and 1 < len(self.nodes) < self.size

    @property
    def keeps_order(self) -> bool:
        """Whether each node is a whole subtree of the canonical order: 2^k neighbours on every node."""
        each = len(self.nodes[0])
        in_order = all(
            ranks == tuple(range(i * each, (i + 1) * each)) for i, ranks in enumerate(self.nodes)
        )
        return in_order and each & (each - 1) == 0


@dataclass(frozen=True)
class CollectiveCall:
    """What a call asks for, beside its arrays. Checked when it is made; raises CommError."""

    operation: str
    op: str = "sum"
    root: int = 0
    algorithm: str = "auto"
    fixed_order: bool = False

    def __post_init__(self) -> None:
        check_known(self.operation, OPERATIONS, "operation")
        check_known(self.op, OPS, "reduction")


def check_known(word: str, known: Sequence[str], what: str) -> None:
    """Raise CommError unless `word` is one of `known`."""
    if word not in known:
        near = get_close_matches(str(word), known, n=1, cutoff=0.0)[0]
        raise CommError(
            f"no {what} is called {word!r}; did you mean {near!r}? Known: {', '.join(known)}"
        )


def available(operation: str, layout: NodeMap) -> tuple[str, ...]:
    """The algorithms that can run `operation` here, `auto` first."""
    one_team = layout.size == 1 or (layout.shares_memory and layout.on_one_node)
    lists = list(ALGORITHMS.get(operation, ()))
    if "ring" in lists:
        lists.insert(lists.index("ring") + 1, "segmented-ring")
    if operation == "allreduce" and layout.two_level:
        lists.append("two-level")
    return (
        "auto",
        *(["shared"] if one_team else []),
        *lists,
        "native",
        *(["reference"] if operation != "barrier" else []),
    )


def choose(
    wish: CollectiveCall,
    element: str,
    nbytes: int,
    layout: NodeMap,
    in_shared: bool,
    profile: Profile | None,
) -> str:
    """The algorithm for a call. `in_shared`: the arrays lie in node-shared memory.

    Raises CommError for an algorithm that does not exist, can't run here, or can't keep the order asked for.
    """
    if wish.op == "mean" and element not in FLOATS:
        raise CommError(
            f"a mean of {element} is no {element}; reduce by sum, or convert to a float type"
        )
    able = available(wish.operation, layout)
    algorithm = wish.algorithm
    if algorithm == "two-level" and layout.on_one_node:
        # A recipe for a cluster runs on a laptop too.
        algorithm = "shared" if "shared" in able else "auto"
    _check_able(wish.operation, algorithm, able, layout)
    ordered = wish.fixed_order and wish.operation in REDUCING
    if ordered:
        able = tuple(name for name in able if _keeps_order(name, layout))
    if algorithm == "auto":
        known = None
        if profile is not None:
            allowed = [name for name in able if name not in ("auto", "reference")]
            where = (len(layout.nodes), layout.size)
            known = profile.best(
                wish.operation, nbytes, element, *where, allowed, node_shared=in_shared
            )
        return known or table(wish.operation, element, nbytes, layout, in_shared, able)
    if algorithm not in able:
        raise CommError(
            f"{algorithm} cannot keep the fixed order of a sum here; take one of {', '.join(able)}, "
            "or leave fixed_order out"
        )
    return algorithm


def _check_able(operation: str, algorithm: str, able: Sequence[str], layout: NodeMap) -> None:
    needs = {
        "shared": "all ranks on one node, and room in its shared memory",
        "two-level": "several nodes, several ranks on one of them, and room in its shared memory",
    }
    if algorithm in needs and algorithm not in able and operation != "barrier":
        raise CommError(
            f"{operation} by {algorithm} needs {needs[algorithm]}; here are {layout.size} ranks on {len(layout.nodes)} "
            f"node(s), with{'' if layout.shares_memory else 'out'} shared memory; take one of {', '.join(able)}"
        )
    check_known(algorithm, able, f"algorithm for {operation}")


def _keeps_order(algorithm: str, layout: NodeMap) -> bool:
    if algorithm == "two-level":
        return layout.keeps_order
    return algorithm in FIXED_ORDER or algorithm in ("auto", "shared", "reference")


def table(
    operation: str, element: str, nbytes: int, layout: NodeMap, in_shared: bool, able: Sequence[str]
) -> str:
    """The choice without a profile."""
    return next(
        name for name in _preferences(operation, element, nbytes, layout, in_shared) if name in able
    )


def _preferences(
    operation: str, element: str, nbytes: int, layout: NodeMap, in_shared: bool
) -> list[str]:
    # 16-bit floats the libraries add slowly or not at all; short integers saturate in Open MPI, where ours wrap.
    native_wins = operation not in REDUCING or not (
        element in SHORT_FLOATS or element in SHORT_INTEGERS
    )
    if layout.on_one_node and layout.shares_memory:
        better = _over_stage(operation, nbytes, layout) if native_wins and not in_shared else []
        return [*better, "shared", "native", *_by_size(nbytes)]
    if native_wins and nbytes < _lists_win_from(operation, layout):
        return ["native", *_by_size(nbytes)]
    if layout.on_one_node and nbytes >= FEW_ROUNDS_BYTES:
        return ["ring", *_by_size(nbytes), "native"]
    return ["two-level", *_by_size(nbytes), "native"]


def _by_size(nbytes: int) -> list[str]:
    """Over a network: few rounds for small arrays, few bytes and both directions at once for large ones."""
    if nbytes < FEW_ROUNDS_BYTES:
        return ["recursive-doubling", "recursive-halving", "rabenseifner", "binomial", "pairwise"]
    return [
        "segmented-ring",
        "rabenseifner",
        "recursive-halving",
        "scatter-allgather",
        "binomial",
        "pairwise",
    ]


def _lists_win_from(operation: str, layout: NodeMap) -> float:
    """The bytes from which on lists beat the library's own between processes that share no memory."""
    if not layout.on_one_node:
        return FEW_BYTES
    if operation in ONE_CALL:
        return ONE_CALL_BYTES
    return RING_BYTES if operation in ("allreduce", "reduce_scatter") else inf


def _over_stage(operation: str, nbytes: int, layout: NodeMap) -> list[str]:
    """What beats the stage on private arrays of one node. Its two copies weigh less, the more ranks there are."""
    if layout.size != 2:
        return []
    known = (spans for library, spans in _OVER_STAGE.items() if library in layout.library)
    spans = next(known, {}).get(operation, ())
    return [name for name, first, stop in spans if first <= nbytes < stop]
