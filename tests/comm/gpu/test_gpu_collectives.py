"""Collectives on a simulated GPU: plans, ways, stream order, and refused calls.

test_gpu_pieces.py runs the same calls on real GPUs.
"""

import importlib.util
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.buffers import ELEMENTS, as_buffer
from mpillm.comm.communicator import Communicator
from mpillm.comm.executors.segmented import Segmentation
from mpillm.comm.gpu import nccl
from mpillm.comm.gpu.device_arrays import as_device_buffer
from mpillm.comm.gpu.device_buffer import is_on_device
from mpillm.comm.gpu.gpu_aware import schedule_for, way
from mpillm.comm.gpu.probe import TRIALS
from mpillm.comm.gpu.staging import StagingSpan, plan_staging
from mpillm.comm.selection import OPERATIONS, CollectiveCall
from mpillm.errors import CommError

specification = importlib.util.spec_from_file_location(
    "simulated", Path(__file__).with_name("simulated_cupy.py")
)
simulated = importlib.util.module_from_spec(specification)
specification.loader.exec_module(simulated)

MOVING = tuple(name for name in OPERATIONS if name != "barrier")
REDUCING = ("allreduce", "reduce_scatter", "reduce")
EVERYTHING = dict.fromkeys(TRIALS, True)
TOLERANCE = {"float64": 1e-13, "float32": 1e-5, "float16": 8e-3, "bfloat16": 6e-2}


# ---- the plan of segments ----


def host_collective(operation, rows, root):
    """Compute each rank's segment after the collective; rows: (ranks, count)."""
    size, count = rows.shape
    if operation in REDUCING:
        return np.broadcast_to(rows.sum(0), rows.shape)
    if operation == "broadcast":
        return np.broadcast_to(rows[root], rows.shape)
    blocks = rows.reshape(size, size, count // size)
    if operation == "alltoall":
        return blocks.transpose(1, 0, 2).reshape(size, count)
    return np.broadcast_to(np.concatenate([blocks[rank, rank] for rank in range(size)]), rows.shape)


def by_plan(operation, wholes, root, most, in_place):
    """Run all ranks' plans; return every rank's target, NaN where nothing was written."""
    size, count = wholes.shape
    bounds = block_bounds(count, size)
    plans = [
        plan_staging(operation, count, size, rank, root, most, in_place=in_place)
        for rank in range(size)
    ]
    sources = list(wholes.copy())
    if not in_place and operation == "allgather":
        sources = [wholes[rank, bounds[rank] : bounds[rank + 1]] for rank in range(size)]
    own = not in_place and operation == "reduce_scatter"
    targets = (
        sources
        if in_place
        else [
            np.full(bounds[rank + 1] - bounds[rank] if own else count, np.nan)
            for rank in range(size)
        ]
    )
    assert len({tuple(segment.count for segment in each) for each in plans}) == 1
    for together in zip(*plans, strict=True):
        rows = np.full((size, together[0].count), 1e9)
        for row, segment, source in zip(rows, together, sources, strict=True):
            assert segment.count <= max(most, size)
            for span in segment.down:
                row[span.host : span.host + span.count] = source[
                    span.device : span.device + span.count
                ]
        results = host_collective(operation, rows, root)
        for row, segment, target in zip(results, together, targets, strict=True):
            for span in segment.up:
                target[span.device : span.device + span.count] = row[
                    span.host : span.host + span.count
                ]
    return targets


@pytest.mark.parametrize("operation", MOVING)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("most", [1, 5, 16, 1000])
def test_segments_put_together_are_the_collective(operation, size, most):
    for count, in_place in itertools.product((1, 6, 41, 100), (True, False)):
        count = count * size if operation == "alltoall" else count
        if operation == "broadcast" and not in_place:
            continue
        root, bounds = size - 1, block_bounds(count, size)
        wholes = np.arange(size * count, dtype=np.float64).reshape(size, count) ** 2
        gathered = np.concatenate(
            [wholes[rank, bounds[rank] : bounds[rank + 1]] for rank in range(size)]
        )
        for rank, found in enumerate(by_plan(operation, wholes, root, most, in_place)):
            first, stop = bounds[rank : rank + 2]
            if operation == "reduce_scatter":
                own = found[first:stop] if in_place else found
                np.testing.assert_array_equal(own, wholes.sum(0)[first:stop])
                if in_place:
                    kept = np.delete(np.arange(count), range(first, stop))
                    np.testing.assert_array_equal(found[kept], wholes[rank][kept])
            elif operation == "allgather":
                np.testing.assert_array_equal(found, gathered)
            elif operation == "reduce" and rank != root:
                np.testing.assert_array_equal(
                    found, wholes[rank] if in_place else np.full(count, np.nan)
                )
            else:
                np.testing.assert_array_equal(found, host_collective(operation, wholes, root)[rank])


def test_an_empty_array_has_no_segments():
    assert all(
        plan_staging(operation, 0, 4, 1, 0, 100, in_place=True) == () for operation in MOVING
    )


def test_only_the_last_segment_is_short():
    lengths = [
        segment.count for segment in plan_staging("allreduce", 1000, 4, 0, 0, 300, in_place=True)
    ]
    assert lengths == [300, 300, 300, 100]
    assert plan_staging("broadcast", 10, 4, 2, 1, 300, in_place=True)[0].down == ()
    assert plan_staging("broadcast", 10, 4, 1, 1, 300, in_place=True)[0].down == (
        StagingSpan(0, 0, 10),
    )


# ---- on a simulated GPU ----


@pytest.fixture
def gpu():
    """Replace cupy by the simulated one; yield (cupy, machine)."""
    with simulated.pretended(seed=7) as (cupy, machine):
        yield cupy, machine


@pytest.fixture
def gpu_communicator(comm, gpu):
    """Make a communicator whose profile allows every way."""
    profile = SimpleNamespace(best=lambda *_, **__: None, gpu_probe={"mpi": EVERYTHING})
    made = Communicator(comm, profile=profile)
    yield made
    made.free()


def values(element, count, rank):
    chance = np.random.default_rng([count, rank])
    if element in ("float64", "float32", "float16", "bfloat16"):
        return torch.from_numpy(chance.standard_normal(count)).to(getattr(torch, element))
    return torch.from_numpy(chance.integers(0, 9, count).astype(element))


def on_gpu(cupy, tensor, element):
    """Copy a tensor to a CuPy array; bfloat16 as a DeviceBuffer, as NumPy has no such type."""
    raw = np.frombuffer(
        bytearray(as_buffer(tensor).octets.tobytes()),
        "uint16" if element == "bfloat16" else element,
    )
    array = cupy.asarray(raw)
    return replace(as_device_buffer(array), element=element) if element == "bfloat16" else array


def memory_of(array):
    return getattr(array, "flat", array).memory


def tensor_of(memory, element):
    raw = np.ascontiguousarray(memory)
    return (
        torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
        if element == "bfloat16"
        else torch.from_numpy(raw)
    )


def expected(operation, op, rows, rank, root):
    """Compute the defined part of the result, wide: (first, values) in the whole array."""
    wide = rows.double() if rows.is_floating_point() else rows
    size, count = rows.shape
    bounds = block_bounds(count, size)
    if operation == "broadcast":
        return 0, wide[root]
    if operation == "allgather":
        return 0, torch.cat([wide[r, bounds[r] : bounds[r + 1]] for r in range(size)])
    if operation == "alltoall":
        return 0, torch.cat([wide[r].reshape(size, -1)[rank] for r in range(size)])
    if operation == "reduce" and rank != root:
        return 0, wide[rank]
    total = {
        "sum": wide.sum(0),
        "mean": wide.sum(0) / size,
        "max": wide.amax(0),
        "min": wide.amin(0),
    }[op]
    first, stop = bounds[rank : rank + 2]
    return (first, total[first:stop]) if operation == "reduce_scatter" else (0, total)


def run_once(
    gpu, communicator, operation, way, element, count, in_place, op="sum", root=0, handle=False
):
    """Run a call between a late source and work that overwrites the arrays, in one stream."""
    cupy, _ = gpu
    rows = torch.stack([values(element, count, rank) for rank in range(communicator.size)])
    first, stop = block_bounds(count, communicator.size)[communicator.rank : communicator.rank + 2]
    given = (
        rows[communicator.rank]
        if in_place or operation != "allgather"
        else rows[communicator.rank, first:stop]
    )
    late = on_gpu(cupy, given, element)
    source = on_gpu(cupy, torch.zeros_like(given), element)
    target = source
    if not in_place:
        length = stop - first if operation == "reduce_scatter" else count
        target = on_gpu(cupy, torch.zeros(length, dtype=given.dtype), element)
    side, seen = cupy.cuda.Stream(non_blocking=True), []
    with side:
        side.queue.append(lambda: np.copyto(memory_of(source), memory_of(late)))
        ready = communicator.prepare(
            operation, source, None if in_place else target, op=op, root=root, algorithm=way
        )
        if handle == "polled":
            under_way = ready.start()
            while not under_way.test():
                pass
        elif handle:
            ready.start().wait()
        else:
            ready.run()
        side.queue.append(lambda: seen.append(memory_of(target).copy()))
        side.queue.append(lambda: (memory_of(source).fill(55), memory_of(target).fill(55)))
    side.synchronize()
    found = tensor_of(seen[0], element)
    if operation == "reduce" and not in_place and communicator.rank != root:
        return ready.algorithm
    begin, wanted = expected(operation, op, rows, communicator.rank, root)
    own = found[begin : begin + len(wanted)] if in_place or operation != "reduce_scatter" else found
    if op in ("sum", "mean") and operation in REDUCING and element in TOLERANCE:
        tolerance = TOLERANCE[element] * communicator.size
        torch.testing.assert_close(
            own.double(), wanted, rtol=tolerance, atol=tolerance, msg=f"{operation} {way}"
        )
    else:
        assert torch.equal(own.to(wanted.dtype), wanted), (operation, way, element, count, in_place)
    return ready.algorithm


def ways(communicator, operation, cupy):
    return list(communicator.algorithms(operation, cupy.asarray(np.ones(1, np.float32))))


@pytest.mark.parametrize("operation", MOVING)
@pytest.mark.parametrize("element", ["float32", "bfloat16", "int64"])
def test_every_way_in_the_order_of_the_stream(gpu, gpu_communicator, operation, element):
    communicator, size = gpu_communicator, gpu_communicator.size
    able = ways(communicator, operation, gpu[0])
    assert able[: able.index("staged")] == (
        ["auto", "nccl", "device-mpi"] if size > 1 else ["auto"]
    )
    roots = {0, size - 1} if operation in ("broadcast", "reduce") else {0}
    for algorithm, blocks, in_place, root in itertools.product(
        able, (1, 999), (True, False), roots
    ):
        if operation == "broadcast" and not in_place:
            continue
        count = blocks * size + (0 if operation == "alltoall" else min(size - 1, 1))
        handle = "polled" if blocks == 999 and in_place else blocks == 999
        run_once(
            gpu,
            communicator,
            operation,
            algorithm,
            element,
            count,
            in_place,
            root=root,
            handle=handle,
        )


@pytest.mark.parametrize("op", ["mean", "max", "min"])
@pytest.mark.parametrize("element", ["float32", "float16", "bfloat16"])
def test_other_reductions(gpu, gpu_communicator, op, element):
    able = (
        ("auto", "nccl", "device-mpi", "staged")
        if gpu_communicator.size > 1
        else ("auto", "staged")
    )
    for operation, algorithm, in_place in itertools.product(REDUCING, able, (True, False)):
        run_once(
            gpu,
            gpu_communicator,
            operation,
            algorithm,
            element,
            1001,
            in_place,
            op=op,
            handle=in_place,
        )


def test_many_segments_overlap(gpu, gpu_communicator, monkeypatch):
    """With slots far smaller than the array, copies of several segments are in flight at once."""
    monkeypatch.setattr("mpillm.comm.gpu.pinned.SEGMENT_BYTES", 4096)
    for operation in MOVING:
        for in_place in (True, False) if operation != "broadcast" else (True,):
            run_once(
                gpu,
                gpu_communicator,
                operation,
                "staged",
                "float32",
                12_000 * gpu_communicator.size,
                in_place,
            )
    assert gpu[1].busiest >= 3 or gpu_communicator.size == 1, "the caller, down, and up"


@pytest.mark.parametrize("segment_bytes", [1024, 2**20])
@pytest.mark.parametrize("operation", MOVING)
def test_long_lists(gpu, gpu_communicator, monkeypatch, operation, segment_bytes):
    """Lists of as many rounds as there are ranks, each of whole blocks or of segments."""
    monkeypatch.setattr("mpillm.comm.gpu.gpu_aware.SEGMENTS", Segmentation(segment_bytes))
    if gpu_communicator.size > 1:
        count = 80_000 * gpu_communicator.size + (0 if operation == "alltoall" else 1)
        run_once(gpu, gpu_communicator, operation, "device-mpi", "bfloat16", count, in_place=True)


def test_handles_in_any_order(gpu, gpu_communicator):
    cupy, machine = gpu
    names = [name for name in ways(gpu_communicator, "allreduce", cupy) if name != "reference"]
    arrays = [
        cupy.asarray(np.full(30_000 + index, gpu_communicator.rank + 1.0, np.float32))
        for index in range(2 * len(names))
    ]
    cpu = np.full(5000, gpu_communicator.rank + 1.0, np.float32)
    handles = [
        gpu_communicator.prepare("allreduce", array, algorithm=name).start()
        for array, name in zip(arrays, itertools.cycle(names), strict=False)
    ]
    handles.insert(3, gpu_communicator.prepare("allreduce", cpu).start())
    for handle in reversed(handles) if gpu_communicator.rank % 2 else handles:
        handle.wait()
        assert handle.test()
    for stream in list(machine.streams.values()):
        stream.synchronize()
    total = sum(range(1, gpu_communicator.size + 1))
    assert all((array == total).all() for array in [*map(memory_of, arrays), cpu])


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_a_wait_in_another_stream_is_in_order_too(gpu, gpu_communicator, op):
    """The call starts in a late stream; a second stream waits for it and reads the result."""
    cupy, _ = gpu
    one, other = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    for name in ways(gpu_communicator, "reduce_scatter", cupy):
        array, seen = cupy.asarray(np.zeros(5000 * gpu_communicator.size, np.float32)), []
        whole = memory_of(array)
        own = whole[5000 * gpu_communicator.rank :][:5000]
        with one:
            one.queue.append(lambda whole=whole: whole.fill(2.0))
            handle = gpu_communicator.prepare(
                "reduce_scatter", array, op=op, algorithm=name
            ).start()
        with other:
            handle.wait()
            for stream in (one, other):
                stream.queue.append(lambda own=own, seen=seen: seen.append(own.copy()))
        one.synchronize()
        other.synchronize()
        assert all(
            (found == (2.0 if op == "mean" else 2.0 * gpu_communicator.size)).all()
            for found in seen
        ), name


def test_a_prepared_call_runs_again_on_another_stream(gpu, gpu_communicator):
    cupy, _ = gpu
    for name in ways(gpu_communicator, "allreduce", cupy):
        array = cupy.asarray(np.ones(5000, np.float32))
        ready = gpu_communicator.prepare("allreduce", array, algorithm=name)
        for turn in range(1, 4):
            with cupy.cuda.Stream(non_blocking=True) as stream:
                ready.run()
                stream.synchronize()
            assert (memory_of(array) == gpu_communicator.size**turn).all(), name


def test_fixed_order_is_staged(gpu, gpu_communicator):
    cupy, _ = gpu
    own = values("bfloat16", 5000, gpu_communicator.rank)
    host = own.clone()
    gpu_communicator.allreduce(host, fixed_order=True)
    array = on_gpu(cupy, own, "bfloat16")
    ready = gpu_communicator.prepare("allreduce", array, fixed_order=True)
    ready.run()
    cupy.cuda.get_current_stream().synchronize()
    assert ready.algorithm == "staged"
    assert tensor_of(memory_of(array), "bfloat16").view(torch.int16).equal(host.view(torch.int16))
    if gpu_communicator.size > 1:
        with pytest.raises(
            CommError, match="by nccl: it cannot keep the fixed order of a sum; take one of staged"
        ):
            gpu_communicator.prepare("allreduce", array, algorithm="nccl", fixed_order=True)


def test_names_that_the_host_resolves_are_staged(gpu, gpu_communicator):
    """A plug-in; and two-level on one node, as a recipe for a cluster has it on a laptop."""
    for name in ("mpillm.comm.algorithms.ring:RING", "two-level"):
        found = run_once(gpu, gpu_communicator, "allreduce", name, "float32", 5000, True)
        assert found == name
    if gpu_communicator.size > 1:
        ones = gpu[0].asarray(np.ones(4, np.float32))
        with pytest.raises(CommError, match="cannot run broadcast, only"):
            gpu_communicator.prepare(
                "broadcast", ones, algorithm="mpillm.comm.algorithms.ring:RING"
            )


def test_what_is_refused_on_a_gpu(gpu, gpu_communicator):
    cupy, _ = gpu
    ones = cupy.asarray(np.ones(4, np.float32))
    cases = [
        (
            {"array": ones, "algorithm": "ncll"},
            "for allreduce on a GPU is called 'ncll'; did you mean 'nccl'",
        ),
        ({"array": ones, "out": np.ones(4, np.float32)}, "out is a ndarray on the CPU"),
        ({"array": np.ones(4, np.float32), "out": ones}, "CPU, this is a CUDA array"),
        (
            {"array": cupy.asarray(np.ones((4, 3), np.float32).T)},
            r"C-contiguous memory.*\(3, 4\).*cupy.ascontig",
        ),
        ({"array": cupy.asarray(np.ones(3, complex))}, "type complex128 cannot travel"),
        ({"array": cupy.asarray(np.ones(3, ">f4"))}, "byte order"),
        (
            {"array": cupy.asarray(np.ones(3, np.int32)), "op": "mean"},
            "mean needs a floating-point array, got int32",
        ),
        ({"array": ones, "out": cupy.asarray(np.ones(5, np.float32))}, "needs an out of as many"),
    ]
    for settings, rule in cases:
        with pytest.raises(CommError, match=rule):
            gpu_communicator.prepare("allreduce", **settings)
    locked = np.ones(4, np.float32)
    locked.flags.writeable = False
    with pytest.raises(CommError, match="read-only"):
        gpu_communicator.allreduce(cupy.asarray(locked))
    if gpu_communicator.size > 1:
        with pytest.raises(
            CommError,
            match="by nccl: NCCL, as CuPy has it, does not sum int16; take one of device-mpi",
        ):
            gpu_communicator.prepare(
                "allreduce", cupy.asarray(np.ones(3, np.int16)), algorithm="nccl"
            )


def test_without_a_probe_mpi_gets_no_device_pointers(gpu, comm):
    if comm.size == 1:
        pytest.skip("needs another rank")
    cupy, _ = gpu
    communicator = Communicator(comm)
    ones = cupy.asarray(np.ones(4, np.float32))
    assert "device-mpi" not in communicator.algorithms("allreduce", ones)
    with pytest.raises(CommError, match="no probe has shown that this MPI takes GPU memory"):
        communicator.prepare("allreduce", ones, algorithm="device-mpi")
    communicator.free()


def test_auto_follows_the_profile_then_the_order_of_ways(gpu, comm):
    if comm.size == 1:
        pytest.skip("needs another rank")
    cupy, _ = gpu
    asked = []

    def best(*arguments, **settings):
        asked.append((arguments, settings))
        return "ring"

    for profile, chosen in ((None, "nccl"), (SimpleNamespace(best=best), "ring")):
        communicator = Communicator(comm, profile=profile)
        assert (
            communicator.prepare("allreduce", cupy.asarray(np.ones(9, np.float32))).algorithm
            == chosen
        )
        communicator.free()
    assert any(
        settings == {"device": "cuda"} and arguments[1] == 36 for arguments, settings in asked
    )


def test_ranks_that_share_a_gpu_have_no_nccl(gpu, comm, monkeypatch):
    if comm.size == 1:
        pytest.skip("needs another rank")
    cupy, _ = gpu
    monkeypatch.setattr(cupy.cuda.runtime, "deviceGetPCIBusId", lambda number: "0000:07:00.0")
    assert (
        nccl.join(comm, 0, 0)
        == "NCCL needs a GPU a rank, and ranks 0 and 1 share the one at 0000:07:00.0"
    )
    monkeypatch.setattr(cupy.cuda.nccl, "available", comm.rank == 0)
    assert "rank 1: CuPy finds no NCCL library" in nccl.join(comm, 0, 0)


# ---- what needs no simulation ----


class OnDevice:
    """An array that claims to be on a GPU."""

    def __init__(self, **changed):
        self.__cuda_array_interface__ = {
            "shape": (3,),
            "typestr": "<f4",
            "data": (4096, False),
            "version": 3,
        } | changed


def test_without_cupy_the_way_out_is_told(comm, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert is_on_device(OnDevice())
    with pytest.raises(
        CommError, match=r"travel through CuPy, which cannot be loaded .*install mpillm\[cuda12\]"
    ):
        as_device_buffer(OnDevice())
    communicator = Communicator(comm)
    with pytest.raises(CommError, match=r"install mpillm\[cuda12\]"):
        communicator.allreduce(OnDevice())
    communicator.free()


def test_other_libraries_name_their_stream(gpu):
    assert as_device_buffer(OnDevice(stream=1)).current_stream() == 1
    assert as_device_buffer(OnDevice(stream=None)).current_stream() == 0
    assert as_device_buffer(OnDevice(), writable=False).pointer == 4096
    with pytest.raises(CommError, match="read-only"):
        as_device_buffer(OnDevice(data=(4096, True)))
    with pytest.raises(CommError, match="has gaps"):
        as_device_buffer(OnDevice(strides=(8,)))
    assert as_device_buffer(OnDevice(shape=(0, 4), data=(0, False))).count == 0


@pytest.mark.parametrize("array", [None, np.ones(3), torch.ones(3), [1.0], as_buffer(np.ones(2))])
def test_what_lies_on_the_cpu(array):
    assert not is_on_device(array)


def test_the_ways_of_device_pointers():
    assert way("allreduce", "float32", EVERYTHING) == "library"
    assert way("allreduce", "bfloat16", EVERYTHING) == "list"
    assert way("allgather", "bfloat16", EVERYTHING) == "library"
    assert way("allreduce", "float32", EVERYTHING | {"arithmetic": False}) == "list"
    assert way("allreduce", "float32", EVERYTHING | {"arithmetic": False, "messages": False}) == ""
    assert way("broadcast", "float32", {}) == ""
    for operation, nbytes in itertools.product(MOVING, (8, 1 << 30)):
        assert schedule_for(operation, nbytes)


def test_nccl_has_a_type_for_each_element_but_two():
    assert set(ELEMENTS) - set(nccl.TYPES) == {"int16", "uint16"}
    assert CollectiveCall("allreduce").algorithm == "auto"
