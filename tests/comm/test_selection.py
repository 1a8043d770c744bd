"""Which algorithm for which call."""

import itertools
import json
from pathlib import Path

import pytest

from mpillm.comm import default_profile
from mpillm.comm.algorithms.schedule import REDUCING
from mpillm.comm.default_profile import Rule, load_rules
from mpillm.comm.selection import KIB, MIB, OPERATIONS, CollectiveCall, available, choose
from mpillm.errors import CommError, UsageError
from mpillm.machine.cluster_profile import ALIASES
from mpillm.machine.node_map import NodeMap

ALONE = NodeMap(((0,),), False)
NODE = NodeMap(((0, 1),), True, "Open MPI v5")
BARE_NODE = NodeMap(((0, 1),), False, "Open MPI v5")
PAIRS = NodeMap(((0, 1), (2, 3)), True, "Open MPI v5")
SPREAD = NodeMap(((0,), (1,), (2,)), True, "Open MPI v5")
ODD = NodeMap(((0, 1, 2), (3,)), True, "Open MPI v5")


def chosen(
    layout,
    nbytes,
    element="float32",
    operation="allreduce",
    in_shared=False,
    profile=None,
    **options,
):
    return choose(CollectiveCall(operation, **options), element, nbytes, layout, in_shared, profile)


def test_within_a_node_shared_memory_is_taken():
    for nbytes in (64, 64 * KIB, 256 * MIB):
        assert chosen(NODE, nbytes, in_shared=True) == "shared"
    assert chosen(ALONE, 4 * MIB) in available("allreduce", ALONE)


def test_on_a_node_without_shared_memory_the_ring_sums_what_is_large():
    assert (
        chosen(BARE_NODE, 8 * MIB)
        == chosen(BARE_NODE, 8 * MIB, operation="reduce_scatter")
        == "ring"
    )
    assert chosen(BARE_NODE, 8 * MIB - 4) == "mpi"
    for operation in ("allgather", "broadcast", "reduce", "alltoall"):
        assert chosen(BARE_NODE, 1000 * MIB, operation=operation) == "mpi"


@pytest.mark.parametrize("layout", [NODE, BARE_NODE, SPREAD])
@pytest.mark.parametrize("operation", ["allgather", "alltoall"])
def test_one_call_of_the_library_is_kept_below_its_counts(layout, operation):
    assert chosen(layout, 1024 * MIB, operation=operation) != "mpi"


@pytest.mark.parametrize(
    ("library", "operation", "taken"),
    [
        ("Open MPI v5", "allreduce", ("shared", "shared", "mpi", "ring")),
        ("Open MPI v5", "allgather", ("shared", "mpi", "mpi", "mpi")),
        ("Open MPI v5", "reduce_scatter", ("shared", "shared", "shared", "shared")),
        ("Open MPI v5", "broadcast", ("shared", "mpi", "mpi", "mpi")),
        ("Open MPI v5", "reduce", ("shared", "mpi", "shared", "shared")),
        ("MPICH Version: 4.3", "allreduce", ("shared", "shared", "shared", "ring")),
        ("MPICH Version: 4.3", "allgather", ("shared", "shared", "shared", "ring")),
        ("Intel(R) MPI Library 2021", "allreduce", ("shared", "mpi", "shared", "shared")),
        ("Intel(R) MPI Library 2021", "allgather", ("shared", "mpi", "mpi", "mpi")),
        ("Intel(R) MPI Library 2021", "broadcast", ("shared", "mpi", "mpi", "mpi")),
        ("another", "broadcast", ("shared", "shared", "shared", "shared")),
    ],
)
def test_two_ranks_private_arrays_need_not_go_by_the_stage(library, operation, taken):
    sizes = (64, 256 * KIB, 4 * MIB, 8 * MIB)
    layout = NodeMap(((0, 1),), True, library)
    assert tuple(chosen(layout, nbytes, operation=operation) for nbytes in sizes) == taken
    for nbytes in sizes:
        assert chosen(layout, nbytes, operation=operation, in_shared=True) == "shared"
        assert chosen(NodeMap(((0, 1, 2),), True, library), nbytes, operation=operation) == "shared"
        if operation in REDUCING:
            assert chosen(layout, nbytes, "bfloat16", operation) == "shared"
            assert chosen(layout, nbytes, operation=operation, fixed_order=True) == "shared"


@pytest.mark.parametrize("element", ["int8", "uint16", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", [NODE, BARE_NODE, PAIRS, SPREAD, ODD])
def test_the_librarys_sums_of_short_types_are_not_trusted(layout, element):
    for nbytes in (64, 64 * KIB, 4 * MIB, 64 * MIB):
        assert chosen(layout, nbytes, element) != "mpi"


def test_between_nodes_it_goes_by_size():
    assert chosen(PAIRS, 64) == "mpi"
    assert chosen(PAIRS, 16 * MIB) == "two-level"
    assert chosen(ODD, 16 * MIB) == "two-level"
    assert chosen(SPREAD, 16 * MIB) == "segmented-ring"
    assert chosen(SPREAD, 100 * KIB) == "recursive-doubling"


def test_every_operation_has_a_choice_everywhere():
    for layout in (ALONE, NODE, BARE_NODE, PAIRS, SPREAD, ODD):
        for operation in (
            "allreduce",
            "reduce_scatter",
            "allgather",
            "broadcast",
            "reduce",
            "alltoall",
            "barrier",
        ):
            for nbytes in (0, 64, 100 * KIB, 64 * MIB):
                for order in (False, True):
                    found = chosen(layout, nbytes, operation=operation, fixed_order=order)
                    assert found in available(operation, layout)
                    assert found != "auto"


def test_fixed_order_over_nodes():
    assert chosen(PAIRS, 16 * MIB, fixed_order=True) == "two-level"
    assert chosen(ODD, 16 * MIB, fixed_order=True) == "rabenseifner"  # three ranks are no subtree
    with pytest.raises(CommError, match="two-level cannot keep the fixed order"):
        chosen(ODD, 16 * MIB, algorithm="two-level", fixed_order=True)


class Knows:
    """A profile that holds one answer."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def best(
        self, operation, nbytes, element, nodes, ranks, allowed, device="cpu", node_shared=False
    ):
        self.asked.append((operation, nbytes, element, nodes, ranks, node_shared))
        return self.answer if self.answer in allowed else None


def test_a_profile_is_asked_first():
    profile = Knows("rabenseifner")
    assert chosen(PAIRS, 64, profile=profile) == "rabenseifner"
    assert chosen(NODE, 64, in_shared=True, profile=profile) == "rabenseifner"
    assert profile.asked == [
        ("allreduce", 64, "float32", 2, 4, False),
        ("allreduce", 64, "float32", 1, 2, True),
    ]
    assert (
        chosen(NODE, 64, profile=Knows("two-level")) == "shared"
    )  # what cannot run here is not taken
    assert chosen(NODE, 64, algorithm="ring", profile=profile) == "ring"


def test_what_cannot_run_here_says_why():
    with pytest.raises(CommError, match=r"shared needs all ranks on one node.*4 ranks on 2 node"):
        chosen(PAIRS, 64, algorithm="shared")
    with pytest.raises(CommError, match=r"two-level needs several nodes.*3 ranks on 3 node"):
        chosen(SPREAD, 64, algorithm="two-level")
    assert (
        chosen(NODE, 64, algorithm="two-level") == "shared"
    )  # a recipe for a cluster, on a laptop
    with pytest.raises(CommError, match="a mean of int32 needs a floating-point array"):
        chosen(NODE, 64, "int32", op="mean")


MAPS = {
    "1 rank": ((0,),),
    "2 ranks": ((0, 1),),
    "3 ranks": ((0, 1, 2),),
    "8 ranks": (tuple(range(8)),),
    "2 nodes of 2": ((0, 1), (2, 3)),
    "3 nodes of 1": ((0,), (1,), (2,)),
    "nodes of 3 and 1": ((0, 1, 2), (3,)),
    "2 nodes of 4, dealt": ((0, 2, 4, 6), (1, 3, 5, 7)),
}
AXES = {
    "map": list(MAPS),
    "team": ["team", "messages"],
    "library": ["Open MPI v5", "MPICH Version: 4.3", "Intel(R) MPI Library 2021", "another"],
    "operation": list(OPERATIONS),
    "element": ["float32", "bfloat16", "int16"],
    "memory": ["node-shared", "private"],
    "order": ["fixed", "any"],
}


def recorded_choices():
    """Yield every case, its choices from before the profile file, [(from bytes, algorithm)], and
    sizes.
    """
    table = json.loads(Path(__file__).with_name("choices.json").read_text(encoding="utf-8"))
    for text, patterns in table["choices"].items():
        words = text.split()
        runs = list(zip(map(int, words[::2]), words[1::2], strict=True))
        for pattern in patterns:
            values = [
                [name for name in options if part in ("*", name, name.split()[0])]
                for part, options in zip(pattern.split("/"), AXES.values(), strict=True)
            ]
            yield from ((case, runs, table["sizes"]) for case in itertools.product(*values))


@pytest.mark.slow("asks for 290,000 choices")
def test_the_default_profile_chooses_as_the_code_before_it_did():
    """All operations, sizes around each threshold, libraries, node maps, element types, memories
    and orders.
    """
    cases = set()
    for case, runs, sizes in recorded_choices():
        nodes, team, library, operation, element, memory, order = case
        node_map = NodeMap(MAPS[nodes], team == "team", library)
        call = CollectiveCall(operation, fixed_order=order == "fixed")
        for nbytes in sizes:
            wanted = [name for first, name in runs if first <= nbytes][-1]
            found = choose(call, element, nbytes, node_map, memory == "node-shared", None)
            assert found == wanted, (case, nbytes)
        cases.add(case)
    assert len(cases) == len(list(itertools.product(*AXES.values())))


def test_a_rule_with_a_mistyped_key_is_refused(tmp_path):
    with pytest.raises(CommError, match="the unknown key 'form_bytes'"):
        Rule.from_json({"prefer": ["mpi"], "form_bytes": 3})
    (tmp_path / "rules.json").write_text('{"schema": "another", "version": 1, "rules": []}')
    with pytest.raises(CommError, match="is not version 1 of a mpillm default profile"):
        load_rules(tmp_path / "rules.json")
    assert load_rules() is load_rules()
    assert default_profile.FILE.is_file()


@pytest.mark.parametrize(("former", "name"), ALIASES.items())
def test_a_former_name_means_the_present_one(former, name):
    assert former not in available("allreduce", NODE)
    assert CollectiveCall("allreduce", algorithm=former).algorithm == name
    assert chosen(NODE, 64, algorithm=former) == name
    assert chosen(NODE, 64, algorithm=name) == name


def test_a_plugin_is_taken_where_it_can_run_the_call():
    ring, halving = (
        "mpillm.comm.algorithms.ring:RING",
        "mpillm.comm.algorithms.recursive_halving:RECURSIVE_HALVING",
    )
    assert chosen(PAIRS, 64, algorithm=ring) == ring
    assert (
        chosen(PAIRS, 64, operation="reduce_scatter", algorithm=halving, fixed_order=True)
        == halving
    )
    with pytest.raises(
        CommError, match="RING cannot run broadcast, only allreduce, reduce_scatter"
    ):
        chosen(PAIRS, 64, operation="broadcast", algorithm=ring)
    with pytest.raises(CommError, match="RING cannot keep the fixed order"):
        chosen(PAIRS, 64, algorithm=ring, fixed_order=True)
    with pytest.raises(UsageError, match="cannot be imported"):
        chosen(PAIRS, 64, algorithm="nowhere:RING")
