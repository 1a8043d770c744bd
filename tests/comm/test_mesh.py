"""Named axes over the job's ranks."""

import pytest

from mpillm.comm.mesh import (
    Mesh,
    by_hosts,
    check_axes,
    coordinates,
    describe,
    rank_at,
)
from mpillm.errors import LayoutError
from mpillm.machine.node_map import NodeMap


def test_row_major_last_axis_fastest():
    axes = {"data": 2, "pipeline": 3, "tensor": 4}
    places = [coordinates(rank, axes) for rank in range(24)]
    assert places[0] == {"data": 0, "pipeline": 0, "tensor": 0}
    assert places[1] == {"data": 0, "pipeline": 0, "tensor": 1}
    assert places[23] == {"data": 1, "pipeline": 2, "tensor": 3}
    assert [rank_at(place, axes) for place in places] == list(range(24))


def test_errors_hold_rule_values_and_way_out():
    with pytest.raises(LayoutError) as caught:
        check_axes({"data": 2, "pipeline": 2}, 3)
    assert str(caught.value) == (
        "mesh data=2 × pipeline=2 needs 4 ranks, the job has 3; start with -n 4 or change an axis"
    )
    with pytest.raises(LayoutError, match="data=0 must be at least 1"):
        check_axes({"data": 0}, 1)
    with pytest.raises(LayoutError, match="at least one axis"):
        check_axes({}, 1)


def test_one_axis(comm):
    mesh = Mesh(comm, {"data": comm.size})
    axis = mesh.axis("data")
    assert (axis.name, axis.size, axis.rank) == ("data", comm.size, comm.rank)
    assert axis.comm.allreduce(1) == comm.size
    assert mesh.describe() == f"data={comm.size}"
    with pytest.raises(LayoutError, match=r"has no axis 'dat'; did you mean 'data'\?"):
        mesh.axis("dat")
    mesh.free()


def test_a_joint_axis_spans_several(comm):
    inner = 2 if comm.size % 2 == 0 else 1
    mesh = Mesh(comm, {"data": comm.size // inner, "pipeline": 1, "context": inner})
    joint = mesh.joint(("data", "context"))
    assert (joint.size, joint.rank) == (comm.size, comm.rank)
    assert joint.comm.allgather(comm.rank) == list(range(comm.size))
    assert mesh.joint(("data", "context")) is joint
    assert mesh.joint(("data",)) is mesh.axis("data")
    assert mesh.find("tensor") is None
    mesh.free()


def test_two_axes(comm):
    inner = 2 if comm.size % 2 == 0 else 1
    axes = {"data": comm.size // inner, "tensor": inner}
    mesh = Mesh(comm, axes)
    data, tensor = mesh.axis("data"), mesh.axis("tensor")
    assert (data.comm.rank, tensor.comm.rank) == (data.rank, tensor.rank)
    assert tensor.comm.allgather(comm.rank) == [data.rank * inner + place for place in range(inner)]
    assert data.comm.allgather(comm.rank) == [
        place * inner + tensor.rank for place in range(axes["data"])
    ]
    mesh.free()


def test_wrong_mesh_raises_everywhere(comm):
    with pytest.raises(LayoutError, match=describe({"data": comm.size + 1})):
        Mesh(comm, {"data": comm.size + 1})


def test_each_axis_has_a_part_of_the_node_map(comm):
    if comm.size % 2:
        pytest.skip("needs an even number of ranks")
    half = comm.size // 2
    pairs = NodeMap(tuple((2 * node, 2 * node + 1) for node in range(half)), library="one")
    mesh = Mesh(comm, {"data": half, "tensor": 2}, pairs)
    assert mesh.node_map is pairs
    assert mesh.axis("tensor").node_map == NodeMap(((0, 1),), library="one")
    assert mesh.axis("data").node_map == NodeMap(
        tuple((rank,) for rank in range(half)), library="one"
    )
    mesh.free()


def test_ranks_in_the_order_of_their_hosts(comm):
    dealt = NodeMap(tuple(tuple(range(comm.size)[first::2]) for first in range(min(2, comm.size))))
    ordered, node_map = by_hosts(comm, dealt)
    assert ordered.allgather(comm.rank) == dealt.host_order
    assert node_map.host_order == list(range(comm.size))
    ordered.Free()
