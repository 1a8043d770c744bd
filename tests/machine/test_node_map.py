"""Which ranks share a node."""

from pathlib import Path

from mpillm.machine import node_map
from mpillm.machine.node_map import NodeMap, map_nodes, nodes_by_first

DEALT = NodeMap(((0, 2, 4), (1, 3)), True, "Open MPI v5")


def test_questions_to_a_map():
    assert DEALT.size == 5
    assert DEALT.node_of == (0, 1, 0, 1, 0)
    assert DEALT.local_ranks(3) == (1, 3)
    assert [DEALT.local_rank(rank) for rank in range(5)] == [0, 0, 1, 1, 2]
    assert DEALT.host_order == [0, 2, 4, 1, 3]
    assert (DEALT.even, DEALT.on_one_node, DEALT.two_level, DEALT.keeps_order) == (
        False,
        False,
        True,
        False,
    )
    assert NodeMap(((0, 1), (2, 3))).keeps_order
    assert not NodeMap(((0, 2), (1, 3))).keeps_order
    assert not NodeMap(((0, 1, 2), (3, 4, 5))).keeps_order


def test_the_map_of_some_ranks():
    assert DEALT.of_ranks([1, 4, 3]) == NodeMap(((0, 2), (1,)), False, "Open MPI v5")
    assert DEALT.of_ranks(DEALT.host_order) == NodeMap(((0, 1, 2), (3, 4)), False, "Open MPI v5")


def test_nodes_are_ordered_by_their_first_ranks():
    assert nodes_by_first([0, 1, 0, 1, 4]) == ((0, 2), (1, 3), (4,))


def test_no_other_file_asks_mpi():
    house = Path(node_map.__file__).parents[1]
    asking = [path for path in house.rglob("*.py") if ".Split_type(" in path.read_text("utf-8")]
    assert asking == [Path(node_map.__file__)]


def test_mpi_is_asked(comm):
    found = map_nodes(comm)
    assert found.size == comm.size
    assert not found.shares_memory
    assert found.library
    assert comm.allgather(found) == [found] * comm.size
    node = found.split(comm)
    assert node.allgather(comm.rank) == list(found.local_ranks(comm.rank))
    assert node.rank == found.local_rank(comm.rank)
    node.Free()
