"""Collectives against their plain reference: operations, algorithms, types, any number of ranks."""

import itertools
import sys
import types

import numpy as np
import pytest
import torch

from mpillm.comm.algorithms.schedule import REDUCING, Algorithm, Transfer, block_bounds
from mpillm.comm.buffers import ELEMENTS, FLOATS, SHORT_FLOATS, WHOLE, as_buffer
from mpillm.comm.communicator import Communicator
from mpillm.comm.selection import OPERATIONS
from mpillm.errors import CommError
from mpillm.machine.node_map import map_nodes

# Unit of the last place, times the additions that may each round once.
TOLERANCE = {"float64": 1e-14, "float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


@pytest.fixture(scope="module")
def group(comm):
    made = Communicator(comm)
    yield made
    made.free()


def filled(element, count, rank, highest=100):
    generator = np.random.default_rng([count, rank])
    values = (
        generator.integers(0, highest, count)
        if element in WHOLE
        else generator.standard_normal(count)
    )
    return torch.from_numpy(values).to(getattr(torch, element))


def parts(element, count, size, highest=100):
    return torch.stack([filled(element, count, rank, highest) for rank in range(size)])


def wide(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def expected(operation, op, rows, rank, root):
    """Return (first, values) of the defined part of the array of rank `rank`."""
    size, count = rows.shape
    first, stop = block_bounds(count, size)[rank : rank + 2]
    if operation == "broadcast":
        return 0, wide(rows[root])
    if operation == "allgather":
        bounds = block_bounds(count, size)
        return 0, wide(torch.cat([rows[r, bounds[r] : bounds[r + 1]] for r in range(size)]))
    if operation == "alltoall":
        block = count // size
        return 0, wide(torch.cat([rows[r, rank * block : (rank + 1) * block] for r in range(size)]))
    if operation == "reduce" and rank != root:
        return 0, wide(rows[rank])
    totals = {
        "max": lambda: wide(rows).amax(0),
        "min": lambda: wide(rows).amin(0),
        "mean": lambda: wide(rows).mean(0),
    }
    total = totals.get(op, lambda: wide(rows).sum(0))()
    return (first, total[first:stop]) if operation == "reduce_scatter" else (0, total)


def check(found, operation, op, rows, rank, root=0):
    first, values = expected(operation, op, rows, rank, root)
    own = found[first : first + len(values)]
    if found.is_floating_point() and operation in REDUCING and op in ("sum", "mean"):
        tolerance = TOLERANCE[str(found.dtype).removeprefix("torch.")] * len(rows)
        torch.testing.assert_close(own.double(), values.double(), rtol=tolerance, atol=tolerance)
    else:
        assert torch.equal(wide(own), values.to(wide(own).dtype))


def ways(group, operation):
    return [name for name in group.algorithms(operation) if operation != "barrier"]


@pytest.mark.parametrize("count", [0, 1, 7, 1000, 100_001])
@pytest.mark.parametrize("element", ELEMENTS)
def test_allreduce(group, element, count):
    # Open MPI's own sum of 8- and 16-bit integers saturates where ours wraps: it is tested without
    # overflow.
    for algorithm in ways(group, "allreduce"):
        highest = 127 // group.size if algorithm == "mpi" else 100
        tensor = filled(element, count, group.rank, highest)
        group.allreduce(tensor, algorithm=algorithm)
        rows = parts(element, count, group.size, highest)
        if element in WHOLE:
            wrapped = np.sum(rows.numpy(), axis=0, dtype=element)
            np.testing.assert_array_equal(tensor.numpy(), wrapped, err_msg=algorithm)
        else:
            check(tensor, "allreduce", "sum", rows, group.rank)
        assert len(set(group.comm.allgather(as_buffer(tensor).octets.tobytes()))) == 1, algorithm


@pytest.mark.parametrize(
    "operation", [name for name in OPERATIONS if name not in ("allreduce", "barrier")]
)
@pytest.mark.parametrize("element", ["float32", "bfloat16", "int64"])
@pytest.mark.parametrize("blocks", [0, 1, 5, 1000, 70_001])
def test_operations(group, operation, element, blocks):
    count = blocks * group.size + (0 if operation == "alltoall" else min(blocks, 1))
    rows = parts(element, count, group.size)
    for algorithm, in_place, root in itertools.product(
        ways(group, operation),
        (True, False),
        {0, group.size - 1} if operation in ("broadcast", "reduce") else {0},
    ):
        if operation == "broadcast" and not in_place:
            continue
        array = rows[group.rank].clone()
        first, stop = block_bounds(count, group.size)[group.rank : group.rank + 2]
        out = None
        if not in_place:
            out = torch.zeros(
                stop - first if operation == "reduce_scatter" else count, dtype=array.dtype
            )
            if operation == "allgather":
                array = array[first:stop].clone()
        given = array.clone()
        group.prepare(operation, array, out, root=root, algorithm=algorithm).run()
        if in_place:
            check(array, operation, "sum", rows, group.rank, root)
            continue
        assert torch.equal(array, given), f"{algorithm} wrote into its source"
        if operation == "reduce_scatter":
            whole = torch.zeros(count, dtype=array.dtype)
            whole[first:stop] = out
            check(whole, operation, "sum", rows, group.rank, root)
        elif operation != "reduce" or group.rank == root:
            check(out, operation, "sum", rows, group.rank, root)


@pytest.mark.parametrize("op", ["mean", "max", "min"])
@pytest.mark.parametrize("element", ["float32", "float16", "bfloat16", "float64", "int8", "uint8"])
def test_reductions(group, op, element):
    for operation, count in itertools.product(REDUCING, (3, 50_021)):
        for algorithm in ways(group, operation):
            tensor = filled(element, count, group.rank)
            if op == "mean" and element in WHOLE:
                with pytest.raises(CommError, match=f"a mean of {element}"):
                    group.prepare(operation, tensor, op=op, algorithm=algorithm)
                continue
            group.prepare(operation, tensor, op=op, algorithm=algorithm).run()
            check(tensor, operation, op, parts(element, count, group.size), group.rank)


def test_a_maximum_hides_no_nan(group):
    for op, algorithm in itertools.product(("max", "min"), ways(group, "allreduce")):
        if algorithm == "mpi":  # the MPI standard leaves it open
            continue
        array = np.full(100, float(group.rank), np.float32)
        if group.rank == group.size - 1:
            array[50] = np.nan
        group.allreduce(array, op=op, algorithm=algorithm)
        assert np.isnan(array[50]), (op, algorithm)
        assert not np.isnan(array[:50]).any()


@pytest.mark.parametrize("element", FLOATS)
@pytest.mark.parametrize("count", [1, 600, 100_001])
def test_fixed_order_gives_the_same_bits_by_every_algorithm(group, element, count):
    for operation, op in itertools.product(REDUCING, ("sum", "mean")):
        found = {}
        for algorithm in ways(group, operation):
            tensor = filled(element, count, group.rank)
            if algorithm in ("ring", "segmented-ring", "mpi"):
                with pytest.raises(CommError, match="cannot keep the fixed order"):
                    group.prepare(operation, tensor, op=op, algorithm=algorithm, fixed_order=True)
                continue
            group.prepare(operation, tensor, op=op, algorithm=algorithm, fixed_order=True).run()
            first, stop = block_bounds(count, group.size)[group.rank : group.rank + 2]
            if operation == "reduce_scatter":
                tensor = tensor[first:stop]
            if operation != "reduce" or group.rank == 0:
                found[algorithm] = as_buffer(tensor).octets.tobytes()
        assert len(set(found.values())) <= 1, (operation, op, list(found))
        if operation == "allreduce" and group.size > 1:
            assert len(found) >= 5


@pytest.mark.parametrize("element", SHORT_FLOATS)
def test_short_floats_are_summed_in_float32_and_rounded_once(group, element):
    """Against float64: where the node's team sums, the error is half a unit of the last place, and
    float32's.
    """
    if "shared" not in group.algorithms("allreduce"):
        pytest.skip("the ranks share no memory")
    count = 40_000
    tensor = filled(element, count, group.rank)
    group.allreduce(tensor, algorithm="shared")
    exact = parts(element, count, group.size).double().sum(0)
    half_unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[element]
    slack = 1e-6 * parts(element, count, group.size).double().abs().sum(0)
    assert ((tensor.double() - exact).abs() <= half_unit * exact.abs() + slack + 2.0**-25).all()


def test_a_plugin_runs_on_the_executors(group, monkeypatch):
    """An algorithm of a user's module, by name: rank 0 sums and sends the whole array to all."""

    def rounds(rank, size, root):
        others = range(1, size) if rank == 0 else [0]
        down = [Transfer(peer, 0, "copy" if rank else "send") for peer in others]
        up = [Transfer(peer, 0, "send" if rank else "add", added=True) for peer in others]
        return [tuple(up), tuple(down)] if size > 1 else []

    star = Algorithm({"allreduce": rounds}, whole=frozenset({"allreduce"}))
    module = types.ModuleType("users_algorithms")
    monkeypatch.setattr(module, "STAR", star, raising=False)
    monkeypatch.setitem(sys.modules, "users_algorithms", module)
    for op, expected in (("sum", sum(range(1, group.size + 1))), ("max", group.size)):
        array = np.full(3001, group.rank + 1.0)
        ready = group.prepare("allreduce", array, op=op, algorithm="users_algorithms:STAR")
        assert ready.algorithm == "users_algorithms:STAR"
        ready.run()
        assert (array == expected).all()


def test_prepared_runs_again_and_again(group):
    for algorithm in ways(group, "allreduce"):
        array = np.ones(5000, np.float32)
        ready = group.prepare("allreduce", array, algorithm=algorithm)
        for turn in range(1, 4):
            ready.run()
            assert (array == group.size**turn).all(), algorithm


def test_handles_in_any_order(group):
    """Several in flight at a time, waited for from the last to the first on odd ranks."""
    names = ways(group, "allreduce")
    arrays = [
        np.full(30_000 + index, group.rank + 1.0, np.float32) for index in range(2 * len(names))
    ]
    handles = [
        group.prepare("allreduce", array, algorithm=name).start()
        for array, name in zip(arrays, itertools.cycle(names), strict=False)
    ]
    for handle in reversed(handles) if group.rank % 2 else handles:
        handle.wait()
        assert handle.test()
    total = sum(range(1, group.size + 1))
    assert all((array == total).all() for array in arrays)


def test_wait_all_returns_when_nothing_is_in_flight(group):
    group.wait_all()
    arrays = {
        name: np.full(30_000, group.rank + 1.0, np.float32) for name in ways(group, "allreduce")
    }
    handles = [
        group.prepare("allreduce", array, algorithm=name).start() for name, array in arrays.items()
    ]
    group.wait_all()
    assert all(handle.done for handle in handles)
    assert not group.in_flight.calls
    assert all((array == sum(range(1, group.size + 1))).all() for array in arrays.values())


def test_a_test_between_two_starts_changes_nothing(group):
    """A schedule after a copy takes its tag at its start, whether or not a rank tests before the
    next.
    """
    own, other = (
        np.full(30_000, group.rank + 1.0, np.float32),
        np.full(500, group.rank + 1.0, np.float32),
    )
    out = np.empty_like(own)
    first = group.prepare("allreduce", own, out, algorithm="ring").start()
    if group.rank % 2:
        first.test()
    second = group.prepare("allreduce", other, algorithm="ring").start()
    first.wait()
    second.wait()
    total = sum(range(1, group.size + 1))
    assert (out == total).all()
    assert (other == total).all()


def test_handles_are_polled_to_their_end(group):
    for operation in (
        "allreduce",
        "alltoall",
        "broadcast",
        "reduce_scatter",
        "allgather",
        "reduce",
        "barrier",
    ):
        for algorithm in group.algorithms(operation):
            array = (
                None
                if operation == "barrier"
                else np.full(group.size * 10_000, group.rank, np.int32)
            )
            handle = group.prepare(operation, array, algorithm=algorithm).start()
            while not handle.test():
                pass
            if operation == "allreduce":
                assert (array == sum(range(group.size))).all()


def test_a_communicator_with_the_map_of_another(comm):
    """A map that is asked for once serves communicators of the same ranks, and of some of them."""
    node_map = map_nodes(comm)
    whole = Communicator(comm, node_map=node_map)
    assert whole.nodes == [list(ranks) for ranks in node_map.nodes]
    members = [rank for rank in range(comm.size) if rank % 2 == comm.rank % 2]
    part_comm = comm.Split(comm.rank % 2, comm.rank)
    part = Communicator(part_comm, node_map=node_map.of_ranks(members))
    assert part.node_map.nodes == map_nodes(part_comm).nodes
    array = np.full(1000, comm.rank + 1.0)
    part.allreduce(array)
    assert (array == sum(rank + 1 for rank in members)).all()
    for made in (part, whole):
        made.free()
    part_comm.Free()


def test_starting_twice_is_refused(group):
    if group.size == 1:
        pytest.skip("alone, all is done at once")
    array = np.ones(1000, np.float32)
    ready = group.prepare("allreduce", array)
    if group.rank == 0:
        handle = ready.start()
        with pytest.raises(CommError, match="started again before it was done"):
            ready.start()
        group.comm.send(None, 1)
        for rank in range(2, group.size):
            group.comm.send(None, rank)
    else:
        group.comm.recv(source=0)
        handle = ready.start()
    handle.wait()
    assert (array == group.size).all()


def test_shared_memory_is_reduced_where_it_lies(group):
    for element, count in itertools.product(
        ("float32", "bfloat16", "float16", "int8"), (1, 100, 1000, 70_000)
    ):
        rows = group.allocate(count + 64, element)
        if rows is None:
            pytest.skip("the ranks share no memory")
        for first in (0, 32):
            part = rows.buffer.part(first, first + count)
            for operation, order in itertools.product(
                ("allreduce", "reduce_scatter", "allgather"), (False, True)
            ):
                tensor = filled(element, count, group.rank)
                part.octets[:] = as_buffer(tensor).octets
                group.prepare(operation, part, fixed_order=order).run()
                as_buffer(tensor).octets[:] = part.octets
                check(tensor, operation, "sum", parts(element, count, group.size), group.rank)
                group.barrier()
        rows.free()


def test_shared_memory_out_of_place(group):
    """Sources and targets in shared memory, or the one that an operation can push through."""
    count = 5000 * group.size
    rows, results = group.allocate(count, "float32"), group.allocate(count, "float32")
    if rows is None or results is None:
        pytest.skip("the ranks share no memory")
    everyone = parts("float32", count, group.size)
    first, stop = block_bounds(count, group.size)[group.rank : group.rank + 2]
    for turn in range(3):
        rows.own[:] = everyone[group.rank].numpy()
        results.own[:] = -turn
        group.allreduce(rows.buffer, results.buffer)
        check(torch.from_numpy(results.own), "allreduce", "sum", everyone, group.rank)
        assert (rows.own == everyone[group.rank].numpy()).all()
        block = torch.zeros(stop - first)
        group.reduce_scatter(rows.buffer, block)
        torch.testing.assert_close(block, everyone.sum(0)[first:stop], rtol=1e-5, atol=1e-5)
        group.allgather(everyone[group.rank, first:stop].contiguous(), results.buffer)
        check(torch.from_numpy(results.own), "allgather", "sum", everyone, group.rank)
        group.allreduce(
            rows.buffer, block := torch.zeros(count)
        )  # a private target: through the stage
        check(block, "allreduce", "sum", everyone, group.rank)
        group.barrier()
    rows.free()
    results.free()


def test_barrier_keeps_all(group):
    """Nobody passes before everybody came."""
    for _ in range(20):
        arrived = group.comm.allgather(0)
        group.barrier()
        assert len(arrived) == group.size


def test_neighbours(group):
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for count in (0, 1, 100_000):
        given, taken = (
            torch.full((count,), group.rank, dtype=torch.bfloat16),
            torch.empty(count, dtype=torch.bfloat16),
        )
        group.exchange(given, right, taken, left)
        assert (taken == left).all()
        ready = group.prepare_exchange(given, right, taken, left, tag=5)
        for turn in range(3):
            given.fill_(turn)
            handle = ready.start()
            while not handle.test():
                pass
            assert (taken == turn).all()
    if group.size > 1:
        array = np.full(10, group.rank)
        if group.rank == 0:
            group.send(array, 1, tag=3)
        elif group.rank == 1:
            group.receive(array, 0, tag=3)
            assert (array == 0).all()
    with pytest.raises(CommError, match="its rank from 0 to"):
        group.send(np.ones(2), group.size)
    with pytest.raises(CommError, match="tag 9999 is out of range"):
        group.send(np.ones(2), 0, tag=9999)


@pytest.mark.parametrize(
    ("operation", "arrays", "options", "rule"),
    [
        ("allreduce", (np.ones(3), np.ones(4)), {}, "needs an out of as many; it holds 4"),
        (
            "allreduce",
            (np.ones(3), np.ones(3, np.float32)),
            {},
            "array holds float64 and out holds float32",
        ),
        (
            "allreduce",
            (np.ones(3),),
            {"op": "summ"},
            "no reduction is called 'summ'; did you mean 'sum'",
        ),
        (
            "allreduce",
            (np.ones(3),),
            {"algorithm": "rign"},
            "allreduce is called 'rign'; did you mean 'ring'",
        ),
        ("alreduce", (np.ones(3),), {}, "did you mean 'allreduce'"),
        ("allreduce", (np.ones((3, 3))[:, 1],), {}, "C-contiguous"),
        ("allreduce", (np.broadcast_to(np.zeros(1), (1,)),), {}, "read-only"),
        ("reduce", (np.ones(3),), {"root": 99}, "root 99 must be a rank from 0 to"),
        ("broadcast", (np.ones(3), np.ones(3)), {}, "in place"),
        ("reduce_scatter", (np.ones(10), np.ones(11)), {}, "a block of .*; out holds 11"),
        ("allgather", (np.ones(99), np.ones(4)), {}, "a block of .*; array holds 99"),
        (
            "allreduce",
            (np.ones(3),),
            {"algorithm": "ring", "fixed_order": True},
            "cannot keep the fixed order",
        ),
    ],
)
def test_what_does_not_fit(group, operation, arrays, options, rule):
    with pytest.raises(CommError, match=rule):
        group.prepare(operation, *arrays, **options)


def test_blocks_must_be_equal(group):
    if group.size > 1:
        with pytest.raises(
            CommError, match=f"for each of {group.size} ranks; 1 elements are not divisible"
        ):
            group.alltoall(np.ones(1))


def test_a_read_only_array_may_be_a_source(group):
    array, out = np.ones(5), np.empty(5)
    array.flags.writeable = False
    group.allreduce(array, out)
    assert (out == group.size).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: g.allreduce(np.ones(3 if g.rank else 4)), "count 4 on rank 0 and 3 on rank 1"),
        (
            lambda g: g.allreduce(np.ones(4, np.float32 if g.rank else np.float64)),
            "type 'float64' on rank 0",
        ),
        (
            lambda g: g.allreduce(np.ones(4), op="max" if g.rank else "min"),
            "op 'min' on rank 0 and 'max' on rank 1",
        ),
        (
            lambda g: g.broadcast(np.ones(4)) if g.rank else g.allreduce(np.ones(4)),
            "operation 'allreduce' on rank 0",
        ),
    ],
)
def test_debug_finds_who_calls_otherwise(comm, call, words):
    if comm.size == 1:
        pytest.skip("needs another rank")
    careful = Communicator(comm, debug=True)
    careful.barrier()
    careful.allreduce(np.ones(3))
    with pytest.raises(
        CommError, match="collective call 3: all ranks must make the same call"
    ) as caught:
        call(careful)
    assert words in str(caught.value)
    careful.free()


def test_debug_finds_who_is_elsewhere_in_shared_memory(comm):
    careful = Communicator(comm, debug=True)
    rows = careful.allocate(100, "float32")
    if comm.size == 1 or rows is None:
        pytest.skip("needs another rank, and shared memory")
    first = 10 if comm.rank else 0
    with pytest.raises(CommError, match="place in node-shared memory 0 on rank 0 and 40 on rank 1"):
        careful.allreduce(rows.own[first : first + 50])
    with pytest.raises(
        CommError, match="place in node-shared memory 0 on rank 0 and None on rank 1"
    ):
        careful.allreduce(np.ones(50, np.float32) if comm.rank else rows.own[:50])
    rows.free()
    careful.free()


@pytest.mark.slow("2 GiB a rank pass through each algorithm")
@pytest.mark.parametrize("algorithm", ["auto", "ring", "mpi"])
def test_more_than_2_to_the_31(group, algorithm):
    if group.size != 2:
        pytest.skip("takes 2 GiB a rank: at exactly 2 ranks only")
    count = 2**31 + 5
    array = np.full(count, group.rank + 1, np.uint8)
    spots = [0, 2**30, 2**31 - 1, 2**31, -1]
    array[spots] += 10
    group.allreduce(array, algorithm=algorithm)
    assert array[spots].tolist() == [23] * 5
    array[spots] = 3
    for first in range(0, count, 2**24):
        assert (array[first : first + 2**24] == 3).all()
