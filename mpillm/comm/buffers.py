"""What may travel: C-contiguous NumPy arrays and torch CPU tensors, seen flat.

A Buffer shares its array's memory. Messages carry bytes, so that every element type travels alike; MPI knows
no bfloat16, and most libraries no float16.
"""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm.errors import CommError

WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
ELEMENTS = ("float32", "float64", "float16", "bfloat16", *WHOLE)
# torch adds these in vectors; NumPy adds float16 one by one and knows no bfloat16.
ADDED_BY_TORCH = ("float16", "bfloat16")


@dataclass(frozen=True)
class Buffer:
    """An array's memory as one flat row of elements."""

    element: str
    """One of ELEMENTS."""
    flat: Any
    """1-dim NumPy array or torch tensor whose library knows how to add the element type."""
    octets: NDArray[np.uint8]
    """The same memory as bytes."""

    @property
    def count(self) -> int:
        """The number of elements."""
        return int(self.flat.shape[0])

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return int(self.flat.itemsize)

    def raw(self, first: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of elements `first` to `stop`, for MPI to send or receive."""
        return self.octets[first * self.itemsize : stop * self.itemsize]

    def add(self, target: slice, source: "Buffer", source_slice: slice) -> None:
        """self[target] += source[source_slice], in place, in the element type itself."""
        view = self.flat[target]
        view += source.flat[source_slice]

    def empty(self, count: int) -> "Buffer":
        """A new buffer of `count` elements of the same type, its contents undefined."""
        return as_buffer(
            np.empty(count, self.flat.dtype) if isinstance(self.flat, np.ndarray) else self.flat.new_empty(count)
        )


def as_buffer(array: Any) -> Buffer:
    """A C-contiguous NumPy array or torch CPU tensor of any shape as a flat Buffer, without a copy.

    Raises CommError for another kind of array, another element type, a gap in its memory or a read-only one.
    """
    if isinstance(array, Buffer):
        return array
    if isinstance(array, np.ndarray):
        return _from_numpy(array)
    torch = sys.modules.get("torch")  # who passes a tensor has loaded torch; comm itself never does
    if torch is not None and isinstance(array, torch.Tensor):
        return _from_torch(array)
    if hasattr(array, "__cuda_array_interface__"):
        raise CommError(_no_device("a CUDA array"))
    raise CommError(
        f"messages carry NumPy arrays and torch tensors, not {type(array).__name__}; wrap it with numpy.asarray"
    )


def _from_numpy(array: NDArray[Any]) -> Buffer:
    element = array.dtype.name
    _check(element, array.flags.c_contiguous, array.shape, "numpy.ascontiguousarray")
    if not array.dtype.isnative:
        raise CommError(
            f"an array of byte order {array.dtype.str!r} cannot be summed; convert it with .astype({element!r})"
        )
    if not array.flags.writeable:
        raise CommError("a read-only array cannot take a result; pass a copy of it")
    flat = array.reshape(-1)
    return Buffer(element, flat, flat.view(np.uint8))


def _from_torch(tensor: Any) -> Buffer:
    if tensor.device.type != "cpu":
        raise CommError(_no_device(f"a tensor on {tensor.device}"))
    element = str(tensor.dtype).removeprefix("torch.")
    _check(element, tensor.is_contiguous(), tuple(tensor.shape), ".contiguous()")
    flat = tensor.detach().reshape(-1)
    if element not in ADDED_BY_TORCH:
        return _from_numpy(flat.numpy())
    # int16 has their size, and NumPy knows it: the memory stays the same.
    return Buffer(element, flat, flat.view(sys.modules["torch"].int16).numpy().view(np.uint8))


def _check(element: str, contiguous: bool, shape: tuple[int, ...], remedy: str) -> None:
    if element not in ELEMENTS:
        raise CommError(f"elements of type {element} cannot travel; convert to one of {', '.join(ELEMENTS)}")
    if not contiguous:
        raise CommError(
            f"a message needs C-contiguous memory, this array of shape {shape} has gaps; make it so with {remedy}"
        )


def _no_device(what: str) -> str:
    return (
        f"messages carry memory of the CPU, this is {what}; copy it with .cpu() first (GPUs come with a later release)"
    )
