"""What may travel, and what may not."""

import sys

import numpy as np
import pytest
import torch

from mpillm.comm.buffers import ELEMENTS, WHOLE, as_buffer, new_octets
from mpillm.comm.shared.segment import PAGE_BYTES
from mpillm.errors import CommError


@pytest.mark.parametrize("element", ELEMENTS)
def test_torch_memory_is_shared(element):
    tensor = torch.arange(6).reshape(2, 3).to(getattr(torch, element))
    buffer = as_buffer(tensor)
    assert (buffer.element, buffer.count, buffer.itemsize) == (element, 6, tensor.element_size())
    other = buffer.empty(4)
    other.octets[:] = np.concatenate([buffer.raw(1, 4), buffer.raw(5, 6)])
    buffer.combining("sum", 2, 4)(other.raw(0, 2))
    assert tensor.flatten().tolist() == [0, 1, 3, 5, 4, 5]
    assert buffer.octets.size == 6 * tensor.element_size()


@pytest.mark.parametrize("element", ["float32", "float64", "float16", *WHOLE])
def test_numpy_memory_is_shared(element):
    array = np.arange(6, dtype=element).reshape(3, 2)
    buffer = as_buffer(array)
    assert (buffer.element, buffer.count, buffer.itemsize) == (element, 6, array.itemsize)
    buffer.combining("sum", 0, 2)(as_buffer(np.full(3, 7, element)).raw(1, 3))
    assert array.reshape(-1).tolist() == [7, 8, 2, 3, 4, 5]


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 100_001])
def test_new_memory_begins_where_it_is_asked_to(nbytes):
    for place in (0, 64, PAGE_BYTES // 2):
        octets = new_octets(nbytes, place)
        assert octets.size == nbytes
        assert nbytes == 0 or octets.ctypes.data % PAGE_BYTES == place
        octets.fill(1)


def test_parameters_and_scalars():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert as_buffer(parameter).count == 3
    assert as_buffer(torch.tensor(2.0)).count == 1
    assert as_buffer(np.array(2.0)).count == 1
    assert as_buffer(np.zeros((0, 3))).count == 0


class OnDevice:
    __cuda_array_interface__ = {}  # noqa: RUF012 - only its presence is asked for


@pytest.mark.parametrize(
    ("array", "rule"),
    [
        (np.zeros((3, 4))[:, 1], r"C-contiguous memory.*\(3,\).*ascontiguousarray"),
        (torch.zeros(3, 4).T, r"C-contiguous memory.*\(4, 3\).*contiguous\(\)"),
        (torch.zeros(3, device="meta"), "CPU, this is a tensor on meta"),
        (OnDevice(), "CPU, this is a CUDA array"),
        (np.zeros(2, complex), "type complex128 cannot travel; convert to one of float32"),
        (torch.zeros(2, dtype=torch.bool), "type bool cannot travel"),
        (np.zeros(2, ">f4" if sys.byteorder == "little" else "<f4"), "byte order"),
        (np.broadcast_to(np.zeros(1), (1,)), "read-only"),
        ([1.0], "not list; wrap it with numpy.asarray"),
    ],
)
def test_what_cannot_travel(array, rule):
    with pytest.raises(CommError, match=rule):
        as_buffer(array)


def test_comm_on_numpy_loads_no_torch(python):
    script = (
        "import mpillm.comm.communicator as g, numpy, sys; "
        "g.as_buffer(numpy.ones(3)); print('torch' in sys.modules)"
    )
    assert python("-c", script).stdout == "False\n"
