"""Algorithm selection: which algorithms can run a call here, and which of them is fastest.

The cluster's profile, written by `mpillm bench … --save`, decides where it has figures for the
call. Else the default profile does, which ships with mpillm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

from mpillm.comm.algorithms.algorithm_catalog import algorithms_of, load_algorithm
from mpillm.comm.algorithms.schedule import REDUCING
from mpillm.comm.buffers import FLOATS
from mpillm.comm.default_profile import DefaultProfile
from mpillm.errors import CommError
from mpillm.machine.cluster_profile import ALIASES
from mpillm.machine.node_map import NodeMap
from mpillm.system.plugins import is_plugin

OPERATIONS = (
    "allreduce",
    "reduce_scatter",
    "allgather",
    "broadcast",
    "reduce",
    "alltoall",
    "barrier",
)
OPS = ("sum", "mean", "max", "min")
KIB, MIB = 1024, 1024 * 1024
# Algorithms that are not schedules and keep a fixed order; two-level keeps it on some node maps
# only.
ORDERED = ("auto", "shared", "reference")


class Profile(Protocol):
    """A source of choices: the cluster's profile, and the default profile."""

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
    ) -> str | None:
        """Return the fastest of the `allowed` algorithms; None where the profile has no figure."""


@dataclass(frozen=True)
class CollectiveCall:
    """The arguments of a call apart from its arrays. Raises CommError for unknown words.

    `algorithm`: a name of `available`, or `package.module:Name` of a plug-in; former names are
    replaced.
    """

    operation: str
    op: str = "sum"
    root: int = 0
    algorithm: str = "auto"
    fixed_order: bool = False

    def __post_init__(self) -> None:
        check_known(self.operation, OPERATIONS, "operation")
        check_known(self.op, OPS, "reduction")
        object.__setattr__(self, "algorithm", ALIASES.get(self.algorithm, self.algorithm))


def check_known(word: str, known: Sequence[str], what: str) -> None:
    """Raise CommError unless `word` is one of `known`."""
    if word not in known:
        near = get_close_matches(str(word), known, n=1, cutoff=0.0)[0]
        raise CommError(
            f"no {what} is called {word!r}; did you mean {near!r}? Known: {', '.join(known)}"
        )


def available(operation: str, node_map: NodeMap) -> tuple[str, ...]:
    """List the algorithms that can run `operation` here, `auto` first; no plug-ins."""
    one_team = node_map.size == 1 or (node_map.shares_memory and node_map.on_one_node)
    scheduled = list(algorithms_of(operation))
    if "ring" in scheduled:
        scheduled.insert(scheduled.index("ring") + 1, "segmented-ring")
    if operation == "allreduce" and node_map.two_level:
        scheduled.append("two-level")
    return (
        "auto",
        *(["shared"] if one_team else []),
        *scheduled,
        "mpi",
        *(["reference"] if operation != "barrier" else []),
    )


def choose(
    call: CollectiveCall,
    element: str,
    nbytes: int,
    node_map: NodeMap,
    in_shared: bool,
    profile: Profile | None,
) -> str:
    """Choose the algorithm for a call. `in_shared`: the arrays are in node-shared memory.

    Raises CommError for an algorithm that does not exist, cannot run here, or cannot keep a fixed
    order.
    """
    if call.op == "mean" and element not in FLOATS:
        raise CommError(
            f"a mean of {element} needs a floating-point array; use op='sum' or convert the array"
        )
    able = available(call.operation, node_map)
    algorithm = call.algorithm
    if is_plugin(algorithm):
        _check_plugin(call)
        able = (*able, algorithm)
    if algorithm == "two-level" and node_map.on_one_node:
        # A recipe for a cluster runs on a laptop, too.
        algorithm = "shared" if "shared" in able else "auto"
    _check_able(call.operation, algorithm, able, node_map)
    if call.fixed_order and call.operation in REDUCING:
        able = tuple(name for name in able if _keeps_order(name, node_map))
    if algorithm == "auto":
        return _fastest(call, element, nbytes, node_map, in_shared, profile, able)
    if algorithm not in able:
        raise CommError(
            f"{algorithm} cannot keep the fixed order of a sum here; "
            f"take one of {', '.join(able)}, or leave fixed_order out"
        )
    return algorithm


def _fastest(
    call: CollectiveCall,
    element: str,
    nbytes: int,
    node_map: NodeMap,
    in_shared: bool,
    profile: Profile | None,
    able: Sequence[str],
) -> str:
    """Ask the cluster's profile, then the default profile."""
    allowed = [name for name in able if name not in ("auto", "reference")]
    for source in (profile, DefaultProfile(node_map)):
        found = source and source.best(
            call.operation,
            nbytes,
            element,
            len(node_map.nodes),
            node_map.size,
            allowed,
            node_shared=in_shared,
        )
        if found:
            return found
    raise AssertionError(f"the default profile prefers none of {', '.join(allowed)}")


def _check_plugin(call: CollectiveCall) -> None:
    """Raise CommError unless the plug-in exists and can run the operation."""
    rounds = load_algorithm(call.algorithm).rounds
    if call.operation not in rounds:
        raise CommError(
            f"{call.algorithm} cannot run {call.operation}, only {', '.join(rounds)}; "
            "take another algorithm"
        )


def _check_able(operation: str, algorithm: str, able: Sequence[str], node_map: NodeMap) -> None:
    """Raise CommError unless `algorithm` can run here, with the reason where it runs elsewhere."""
    needs = {
        "shared": "all ranks on one node, and room in its shared memory",
        "two-level": "several nodes, several ranks on one of them, and room in its shared memory",
    }
    if algorithm in needs and algorithm not in able and operation != "barrier":
        memory = "with" if node_map.shares_memory else "without"
        raise CommError(
            f"{operation} by {algorithm} needs {needs[algorithm]}; here are {node_map.size} "
            f"ranks on {len(node_map.nodes)} node(s), {memory} shared memory; "
            f"take one of {', '.join(able)}"
        )
    check_known(algorithm, able, f"algorithm for {operation}")


def _keeps_order(algorithm: str, node_map: NodeMap) -> bool:
    """Return whether `algorithm` can sum in the canonical order of trees.py here."""
    if algorithm == "two-level":
        return node_map.keeps_order
    if algorithm in ORDERED:
        return True
    # segmented-ring and mpi are neither schedules of the catalogue nor ordered.
    return algorithm not in ("segmented-ring", "mpi") and load_algorithm(algorithm).fixed_order
