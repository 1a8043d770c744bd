"""Arrays on a GPU as flat DeviceBuffers: torch CUDA tensors, CuPy arrays and their like."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from mpillm.comm.buffers import check_memory, element_of
from mpillm.comm.gpu.device_buffer import DeviceBuffer, is_on_device, load_cupy
from mpillm.errors import CommError


def as_device_buffer(array: Any, writable: bool = True) -> DeviceBuffer:
    """View a C-contiguous array on a GPU, of any shape, as a flat DeviceBuffer, without a copy.

    Raises CommError for an array on the CPU, without CuPy, and as `as_buffer` does.
    """
    if isinstance(array, DeviceBuffer):
        buffer = array
    elif not is_on_device(array):
        raise CommError(
            f"array and out must be on one GPU; out is a {type(array).__name__} on the CPU. "
            "Make it with .to(device)"
        )
    else:
        cupy = load_cupy()
        torch = sys.modules.get("torch")
        is_tensor = torch is not None and isinstance(array, torch.Tensor)
        buffer = _from_torch(cupy, array) if is_tensor else _from_interface(cupy, array)
    if writable and not buffer.writable:
        raise CommError(
            "a read-only array cannot take a result; pass a copy of it, or another array as out"
        )
    return buffer


def _from_torch(cupy: Any, tensor: Any) -> DeviceBuffer:
    element = element_of(tensor.dtype)
    check_memory(element, tensor.is_contiguous(), tuple(tensor.shape), ".contiguous()")
    device, torch = int(tensor.device.index), sys.modules["torch"]
    kept = tensor.detach()  # the buffer must not hold an autograd graph

    def current() -> int:
        return int(torch.cuda.current_stream(device).cuda_stream)

    return _buffer(cupy, element, kept.numel(), int(kept.data_ptr()), kept, device, current, True)


def _from_interface(cupy: Any, array: Any) -> DeviceBuffer:
    interface = array.__cuda_array_interface__
    shape = tuple(interface["shape"])
    # The interface cannot name bfloat16; a CuPy array's dtype can.
    kind = np.dtype(getattr(array, "dtype", interface["typestr"]))
    element = element_of(kind)
    strides, wanted = interface.get("strides"), _strides(shape, kind.itemsize)
    count = int(np.prod(shape, dtype=np.int64))
    check_memory(
        element,
        strides is None or tuple(strides) == wanted or count == 0,
        shape,
        "cupy.ascontiguousarray",
    )
    if not kind.isnative:
        raise CommError(
            f"an array of byte order {kind.str!r} cannot be summed; convert it with "
            f".astype({element!r})"
        )
    pointer, read_only = interface["data"]
    device = _device_of(cupy, array, int(pointer))
    current = _stream_of(cupy, array, device)
    return _buffer(cupy, element, count, int(pointer), array, device, current, not read_only)


def _buffer(
    cupy: Any,
    element: str,
    count: int,
    pointer: int,
    owner: Any,
    device: int,
    current: Callable[[], int],
    writable: bool,
) -> DeviceBuffer:
    kind = np.dtype("uint16" if element == "bfloat16" else element)
    # `owner` keeps the memory alive as long as CuPy's view of it.
    memory = cupy.cuda.UnownedMemory(pointer, count * kind.itemsize, owner, device)
    flat = cupy.ndarray((count,), kind, cupy.cuda.MemoryPointer(memory, 0))
    return DeviceBuffer(element, flat, count, pointer, device, current, cupy, writable)


def _strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Compute the strides of a C-contiguous array, in bytes."""
    return tuple(
        itemsize * int(np.prod(shape[dim + 1 :], dtype=np.int64)) for dim in range(len(shape))
    )


def _device_of(cupy: Any, array: Any, pointer: int) -> int:
    if isinstance(array, cupy.ndarray):
        return int(array.device.id)
    # An array without elements has a null pointer, of which CUDA knows no device.
    return int(
        cupy.cuda.runtime.pointerGetAttributes(pointer).device
        if pointer
        else cupy.cuda.runtime.getDevice()
    )


def _stream_of(cupy: Any, array: Any, device: int) -> Callable[[], int]:
    """Return a function that gives the handle of the stream on which the array's library works.

    It is the stream that the array's interface names, else CuPy's current one.
    """

    def current() -> int:
        named = (
            None
            if isinstance(array, cupy.ndarray)
            else array.__cuda_array_interface__.get("stream")
        )
        if named is not None:
            return int(named)
        with cupy.cuda.Device(device):
            return int(cupy.cuda.get_current_stream().ptr)

    return current
