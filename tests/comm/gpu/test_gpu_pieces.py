"""Collectives of arrays on real GPUs against those of the CPU.

Ranks may share a GPU; NCCL is then not available. test_gpu_collectives.py covers plans, ways and
the order of streams without a GPU.
"""

import itertools
import os

import numpy as np
import pytest
import torch

from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.buffers import ELEMENTS, SHORT_FLOATS, WHOLE, as_buffer
from mpillm.comm.communicator import Communicator
from mpillm.comm.gpu.device_arrays import as_device_buffer
from mpillm.comm.gpu.probe import TRIALS, probe
from mpillm.comm.selection import OPERATIONS
from mpillm.errors import CommError
from mpillm.machine.cluster_profile import Cluster, ClusterProfile


def missing():
    if not torch.cuda.is_available():
        return f"needs a GPU, and torch for CUDA; this is torch {torch.__version__}"
    try:
        import cupy

        return "" if cupy.cuda.runtime.getDeviceCount() else "CuPy finds no GPU"
    except Exception as failure:
        return f"needs CuPy (mpillm[cuda12]): {failure}"


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(missing()), reason=missing() or "there is a GPU"),
]
MOVING = tuple(name for name in OPERATIONS if name != "barrier")
REDUCING = ("allreduce", "reduce_scatter", "reduce")
TOLERANCE = {"float64": 1e-13, "float32": 1e-5, "float16": 8e-3, "bfloat16": 6e-2}
SLOW_CYCLES = 100_000_000
"""About 50 ms of a GPU, so that work which comes too early gives wrong data."""


@pytest.fixture(scope="module")
def probed(comm):
    """Probe this MPI on GPU memory, as `mpillm bench` does."""
    return comm.bcast(probe(os.environ) if comm.rank == 0 else None)


@pytest.fixture(scope="module")
def communicator(comm, probed):
    torch.cuda.set_device(comm.rank % torch.cuda.device_count())
    cluster = Cluster("any", 1, "any", "1", 1, comm.size)
    made = Communicator(comm, profile=ClusterProfile("now", cluster, gpu_probe={"mpi": probed}))
    yield made
    made.free()


def values(element, count, rank):
    chance = np.random.default_rng([count, rank])
    drawn = chance.integers(0, 9, count) if element in WHOLE else chance.standard_normal(count)
    return torch.from_numpy(drawn).to(getattr(torch, element))


def as_library(tensor, library):
    """Copy to this rank's GPU: a torch tensor, or a CuPy array."""
    if library == "torch":
        return tensor.cuda()
    import cupy

    with cupy.cuda.Device(torch.cuda.current_device()):
        return cupy.asarray(tensor.numpy())


def back(array):
    return array.cpu() if isinstance(array, torch.Tensor) else torch.from_numpy(array.get())


def on_the_cpu(communicator, operation, array, out, **wish):
    """Run the same call on the CPU, by the plain reference."""
    communicator.prepare(operation, array, out, algorithm="reference", **wish).run()
    return array if out is None else out


def arrays(operation, rows, rank, in_place):
    """Make (array, out or None) on the CPU."""
    size, count = rows.shape
    first, stop = block_bounds(count, size)[rank : rank + 2]
    own = rows[rank].clone()
    if in_place:
        return own, None
    given = own[first:stop].clone() if operation == "allgather" else own
    return given, torch.zeros(
        stop - first if operation == "reduce_scatter" else count, dtype=rows.dtype
    )


def defined(operation, whole, rank, size, in_place, root):
    """Return the part of a result that the operation defines."""
    if operation == "reduce" and rank != root:
        return whole if in_place else whole[:0]
    if operation == "reduce_scatter" and in_place:
        first, stop = block_bounds(len(whole), size)[rank : rank + 2]
        return whole[first:stop]
    return whole


def same(found, wanted, element, rounds, size):
    if rounds and element in TOLERANCE:
        tolerance = TOLERANCE[element] * size
        torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)
    else:
        assert (
            as_buffer(found.contiguous()).octets.tobytes()
            == as_buffer(wanted.contiguous()).octets.tobytes()
        )


def compare(
    communicator,
    operation,
    way,
    element,
    count,
    in_place,
    library="torch",
    op="sum",
    root=0,
    handle=False,
):
    rows = torch.stack([values(element, count, rank) for rank in range(communicator.size)])
    array, out = arrays(operation, rows, communicator.rank, in_place)
    there = as_library(array, library)
    result = there if in_place else as_library(out, library)
    ready = communicator.prepare(
        operation, there, None if in_place else result, op=op, root=root, algorithm=way
    )
    if handle:
        under_way = ready.start()
        while not under_way.test():
            pass
    else:
        ready.run()
    wanted = on_the_cpu(communicator, operation, array, out, op=op, root=root)
    parts = (
        defined(operation, each, communicator.rank, communicator.size, in_place, root)
        for each in (back(result), wanted)
    )
    same(*parts, element, operation in REDUCING and op in ("sum", "mean"), communicator.size)


def ways(communicator, operation, element="float32"):
    return communicator.algorithms(
        operation, torch.empty(0, dtype=getattr(torch, element), device="cuda")
    )


@pytest.mark.parametrize("operation", MOVING)
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_operation_by_every_way(communicator, operation, element):
    roots = {0, communicator.size - 1} if operation in ("broadcast", "reduce") else {0}
    libraries = ("torch", "cupy") if element != "bfloat16" else ("torch",)
    for way, blocks, in_place, root, library in itertools.product(
        ways(communicator, operation, element), (0, 1, 70_001), (True, False), roots, libraries
    ):
        if operation != "broadcast" or in_place:
            count = blocks * communicator.size + (0 if operation == "alltoall" or not blocks else 1)
            compare(
                communicator,
                operation,
                way,
                element,
                count,
                in_place,
                library,
                root=root,
                handle=blocks == 1,
            )


@pytest.mark.parametrize("op", ["mean", "max", "min"])
@pytest.mark.parametrize("element", ["float32", "float64", *SHORT_FLOATS])
def test_other_reductions(communicator, op, element):
    for operation, in_place in itertools.product(REDUCING, (True, False)):
        for way in ways(communicator, operation, element):
            compare(communicator, operation, way, element, 50_021, in_place, op=op)


def test_many_segments(communicator):
    for way in ways(communicator, "allreduce"):
        if way != "reference":
            compare(communicator, "allreduce", way, "float32", 12_000_001, True)


def test_the_call_takes_its_place_in_the_stream(communicator):
    """A slow kernel, the call and a reader are in one side stream, without synchronization."""
    for way in ways(communicator, "allreduce"):
        side, late = (
            torch.cuda.Stream(),
            torch.full((3_000_000,), communicator.rank + 1.0, device="cuda"),
        )
        array, seen = torch.zeros_like(late), torch.zeros_like(late)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLOW_CYCLES)
            array.copy_(late)
            communicator.allreduce(array, algorithm=way)
            seen.copy_(array)
            array.zero_()
        side.synchronize()
        assert (seen == sum(range(1, communicator.size + 1))).all(), way


def test_a_handle_orders_the_stream_that_waits(communicator):
    for way in ways(communicator, "allreduce"):
        array = torch.zeros(3_000_000, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(SLOW_CYCLES)
            array.fill_(communicator.rank + 1.0)
            handle = communicator.prepare("allreduce", array, algorithm=way).start()
            handle.wait()
            seen = array.clone()
            torch.cuda.current_stream().synchronize()
        assert (seen == sum(range(1, communicator.size + 1))).all(), way


def test_cupy_streams_are_kept_too(communicator):
    import cupy

    for way in ways(communicator, "allreduce"):
        with (
            cupy.cuda.Device(torch.cuda.current_device()),
            cupy.cuda.Stream(non_blocking=True) as stream,
        ):
            array = cupy.zeros(3_000_000, cupy.float32)
            array += communicator.rank + 1.0
            communicator.allreduce(array, algorithm=way)
            seen = array.copy()
            array.fill(0)
            stream.synchronize()
            assert bool((seen == sum(range(1, communicator.size + 1))).all()), way


def test_handles_in_any_order(communicator):
    names = ways(communicator, "allreduce")
    made = [
        torch.full((30_000 + index,), communicator.rank + 1.0, device="cuda")
        for index in range(2 * len(names))
    ]
    handles = [
        communicator.prepare("allreduce", array, algorithm=name).start()
        for array, name in zip(made, itertools.cycle(names), strict=False)
    ]
    handles.insert(3, communicator.prepare("allreduce", np.ones(5000, np.float32)).start())
    for handle in reversed(handles) if communicator.rank % 2 else handles:
        handle.wait()
        assert handle.test()
    assert all((array == sum(range(1, communicator.size + 1))).all().item() for array in made)


@pytest.mark.parametrize("op", ["sum", "max", "min"])
def test_bfloat16_is_rounded_as_torch_rounds_it(op):
    """Every bit pattern against others, on one GPU."""
    import cupy

    chance = np.random.default_rng(1)
    one = torch.from_numpy(np.tile(np.arange(-(2**15), 2**15, dtype=np.int16), 16)).view(
        torch.bfloat16
    )
    two = torch.from_numpy(chance.permutation(one.view(torch.int16).numpy())).view(torch.bfloat16)
    found, other = one.cuda(), two.cuda()
    torch.cuda.synchronize()
    as_device_buffer(found).combining(op, 0, len(one))(as_device_buffer(other).octets)
    cupy.cuda.get_current_stream().synchronize()
    wanted = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[op](one, two)
    number = ~wanted.isnan()
    assert torch.equal(found.cpu().isnan(), wanted.isnan())
    # −0 and 0 are one number, of which either may be the larger.
    differs = (found.cpu().view(torch.int16) != wanted.view(torch.int16)) & number & (wanted != 0)
    assert not differs.any()


@pytest.mark.parametrize("element", ["float32", "float64", *SHORT_FLOATS])
def test_scaling_is_rounded_once(element):
    found = values(element, 100_003, 0).cuda()
    wide = found.double() if element == "float64" else found.float()
    wanted = (wide / 3 if element == "float64" else wide * (1 / 3)).to(found.dtype)
    torch.cuda.synchronize()
    buffer = as_device_buffer(found)
    buffer.scale(1 / 3)
    buffer.settle()
    torch.testing.assert_close(found, wanted, rtol=1e-7 if element == "float32" else 1e-15, atol=0)


def test_the_probe_tells_of_every_trial(probed):
    assert set(probed) == set(TRIALS)


def test_two_gpus_for_one_call(communicator):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with pytest.raises(CommError, match="both must be on one GPU"):
        communicator.allreduce(torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1"))


def test_what_does_not_fit(communicator):
    ones = torch.ones(4, 3, device="cuda")
    with pytest.raises(CommError, match="has gaps"):
        communicator.allreduce(ones.T)
    with pytest.raises(CommError, match="type bool cannot travel"):
        communicator.allreduce(ones > 0)
    with pytest.raises(CommError, match="on the CPU"):
        communicator.allreduce(ones, torch.ones(4, 3))
    with pytest.raises(CommError, match="CPU, this is a tensor on cuda"):
        communicator.send(ones, 0)
