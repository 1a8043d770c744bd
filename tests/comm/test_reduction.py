"""Reductions beside their slow plain reference, at any number of ranks."""

import numpy as np
import pytest
import torch

from mpillm.comm.algorithms import block_bounds
from mpillm.comm.buffers import ELEMENTS, WHOLE, as_buffer
from mpillm.comm.reduction import (
    allgather,
    allreduce,
    can_start,
    choose,
    native_pieces,
    reduce_scatter,
    start_allreduce,
)
from mpillm.errors import CommError

TOLERANCE = {"float64": 1e-14, "float32": 1e-6, "float16": 4e-3, "bfloat16": 4e-2}


def filled(element, count, rank, library="torch", highest=100):
    generator = np.random.default_rng([count, rank])
    values = generator.integers(0, highest, count) if element in WHOLE else generator.standard_normal(count)
    return torch.from_numpy(values).to(getattr(torch, element)) if library == "torch" else values.astype(element)


@pytest.mark.parametrize("count", [0, 1, 7, 1000, 300_001])
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("algorithm", ["auto", "ring", "native", "reference"])
def test_allreduce(comm, algorithm, element, count):
    # Open MPI's own sum of 8- and 16-bit integers saturates where ours wraps: it is tested without overflow.
    highest = 127 // comm.size if algorithm == "native" else 100
    tensor = filled(element, count, comm.rank, highest=highest)
    if algorithm == "native" and element in ("float16", "bfloat16"):
        with pytest.raises(CommError, match=f"no {element} to add; take allreduce = 'ring'"):
            allreduce(comm, tensor, algorithm)
        return
    allreduce(comm, tensor, algorithm)
    parts = [filled(element, count, rank, highest=highest) for rank in range(comm.size)]
    if element in WHOLE:
        wrapped = np.sum([part.numpy() for part in parts], axis=0, dtype=element)
        np.testing.assert_array_equal(tensor.numpy(), wrapped)
    else:
        expected = torch.stack(parts).double().sum(0)
        tolerance = TOLERANCE[element] * comm.size
        torch.testing.assert_close(tensor.double(), expected, rtol=tolerance, atol=tolerance)
    assert len(set(comm.allgather(as_buffer(tensor).octets.tobytes()))) == 1


@pytest.mark.parametrize("element", ["float64", "float32", "float16", *WHOLE])
def test_numpy_and_torch_agree_bitwise(comm, element):
    tensor, array = filled(element, 999, comm.rank), filled(element, 999, comm.rank, "numpy")
    allreduce(comm, tensor, "ring")
    allreduce(comm, array, "ring")
    np.testing.assert_array_equal(array, tensor.numpy())


@pytest.mark.parametrize("count", [0, 1, 10, 1003])
def test_reduce_scatter_and_allgather(comm, count):
    array = np.arange(count, dtype=np.int64) * (comm.rank + 1)
    whole = np.arange(count) * sum(range(1, comm.size + 1))
    first, stop = reduce_scatter(comm, array)
    bounds = block_bounds(count, comm.size)
    assert (first, stop) == (bounds[comm.rank], bounds[comm.rank + 1])
    np.testing.assert_array_equal(array[first:stop], whole[first:stop])
    array[:first] = array[stop:] = -1
    allgather(comm, array)
    np.testing.assert_array_equal(array, whole)


def test_choice():
    small, large = as_buffer(np.empty(1000)), as_buffer(np.empty(2**21))
    assert (choose(small, 2, "auto"), choose(large, 2, "auto")) == ("native", "ring")
    assert choose(large, 64, "auto") == "native"
    assert choose(as_buffer(torch.zeros(3, dtype=torch.bfloat16)), 2, "auto") == "ring"
    assert choose(as_buffer(np.zeros(3, np.int8)), 2, "auto") == "ring"
    with pytest.raises(CommError, match=r"no allreduce is called 'rign'; did you mean 'ring'\?"):
        choose(small, 2, "rign")


def test_native_pieces():
    assert native_pieces(2**31 + 5) == [(0, 2**30), (2**30, 2**31), (2**31, 2**31 + 5)]
    assert native_pieces(0) == []


@pytest.mark.parametrize("algorithm", ["ring", "native"])
def test_more_than_2_to_the_31(comm, algorithm):
    if comm.size != 2:
        pytest.skip("takes 2 GiB a rank: at exactly 2 ranks only")
    count = 2**31 + 5
    array = np.full(count, comm.rank + 1, np.uint8)
    array[[0, 2**30, 2**31 - 1, 2**31, -1]] += 10
    allreduce(comm, array, algorithm)
    assert array[[0, 2**30, 2**31 - 1, 2**31, -1]].tolist() == [23] * 5
    array[[0, 2**30, 2**31 - 1, 2**31, -1]] = 3
    for first in range(0, count, 2**24):
        assert (array[first : first + 2**24] == 3).all()


def test_started_and_finished_later(comm):
    tensors = [filled("float32", count, comm.rank) for count in (0, 5, 100_000)]
    expected = [tensor.clone() for tensor in tensors]
    requests = [request for tensor in tensors for request in start_allreduce(comm, tensor)]
    while not all([request.Test() for request in requests]):  # noqa: C419 - each must be tested, to make it move
        pass
    for tensor, summed in zip(tensors, expected, strict=True):
        allreduce(comm, summed, "native")
        torch.testing.assert_close(tensor, summed)
    half = torch.zeros(3, dtype=torch.bfloat16)
    assert can_start(tensors[0])
    assert not can_start(half)
    with pytest.raises(CommError, match="no bfloat16 to add"):
        start_allreduce(comm, half)
