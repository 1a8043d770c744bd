"""What may travel: C-contiguous NumPy arrays and torch CPU tensors, seen flat.

A Buffer shares its array's memory. Messages carry bytes, so that every element type travels alike; MPI knows
no bfloat16, and most libraries no float16. Arithmetic is done by the compiled kernel, 16-bit floats in float32.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm.comm import kernel
from mpillm.comm.shared.segment import PAGE_BYTES
from mpillm.errors import CommError

WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
SHORT_FLOATS = ("float16", "bfloat16")
FLOATS = ("float32", "float64", *SHORT_FLOATS)
# The kernel counts on the order of these two.
ELEMENTS = (*FLOATS, *WHOLE)
REDUCTIONS = ("sum", "max", "min")


@dataclass(frozen=True)
class Buffer:
    """An array's memory as one flat row of elements."""

    element: str
    """One of ELEMENTS."""
    flat: Any
    """1-dim NumPy array, or torch tensor for the types that NumPy has not."""
    octets: NDArray[np.uint8]
    """The same memory as bytes."""
    count: int
    itemsize: int
    """Bytes of one element."""
    writable: bool = True

    @property
    def code(self) -> int:
        """The element type as the kernel counts them."""
        return ELEMENTS.index(self.element)

    def raw(self, first: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of elements `first` to `stop`, for MPI to send or receive."""
        return self.octets[first * self.itemsize : stop * self.itemsize]

    def part(self, first: int, stop: int) -> "Buffer":
        """Elements `first` to `stop` as a Buffer of their own."""
        return Buffer(
            self.element,
            self.flat[first:stop],
            self.raw(first, stop),
            stop - first,
            self.itemsize,
            self.writable,
        )

    def combine(self, op: str, target: slice, source: "Buffer", source_slice: slice) -> None:
        """self[target] = self[target] op source[source_slice], in place; `op` is one of REDUCTIONS."""
        self.combining(op, target, source, source_slice)()

    def combining(
        self, op: str, target: slice, source: "Buffer", source_slice: slice
    ) -> Callable[[], object]:
        """`combine` as a call, to be made any number of times."""
        own, other = (
            self.raw(target.start, target.stop),
            source.raw(source_slice.start, source_slice.stop),
        )
        return functools.partial(kernel.combine, self.code, REDUCTIONS.index(op), own, other)

    def scale(self, factor: float) -> None:
        """self *= factor, in place; floats only."""
        kernel.scale(self.code, self.octets, factor)

    def empty(self, count: int) -> "Buffer":
        """A new buffer of `count` elements of the same type, its contents undefined."""
        # Some processors copy at a third of their speed where the target stands 1 to 31 bytes further in its page than
        # the source (docs/notes.md). Arrays stand near a page's beginning as a rule, what they are copied to amidst it.
        return from_octets(new_octets(count * self.itemsize, PAGE_BYTES // 2), self.element)


def new_octets(nbytes: int, place: int = 0) -> NDArray[np.uint8]:
    """New memory that begins `place` bytes within a page; its contents are undefined."""
    memory = np.empty(nbytes + PAGE_BYTES, np.uint8)
    start = (place - memory.ctypes.data) % PAGE_BYTES
    return memory[start : start + nbytes]


@functools.cache
def element_of(dtype: Any) -> str:
    """The name of a NumPy or torch element type, without its library's: NumPy takes its time to tell."""
    return dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")


def itemsize_of(element: str) -> int:
    """Bytes of one element of that name."""
    return 2 if element == "bfloat16" else np.dtype(element).itemsize


def from_octets(octets: NDArray[np.uint8], element: str) -> Buffer:
    """Bytes as a row of `element`: a torch tensor for bfloat16, else a NumPy array, over the same memory."""
    if element == "bfloat16":
        import torch

        return _from_torch(torch.from_numpy(octets.view(np.int16)).view(torch.bfloat16))
    return _from_numpy(octets.view(element))


def as_buffer(array: Any, writable: bool = True) -> Buffer:
    """A C-contiguous NumPy array or torch CPU tensor of any shape as a flat Buffer, without a copy.

    Raises CommError for another kind of array, another element type, a gap in its memory, or a read-only one where
    `writable` asks for one that can take a result.
    """
    if isinstance(array, Buffer):
        buffer = array
    elif isinstance(array, np.ndarray):
        buffer = _from_numpy(array)
    else:
        torch = sys.modules.get(
            "torch"
        )  # who passes a tensor has loaded torch; comm itself never does
        if torch is not None and isinstance(array, torch.Tensor):
            buffer = _from_torch(array)
        elif hasattr(array, "__cuda_array_interface__"):
            raise CommError(_no_device("a CUDA array"))
        else:
            raise CommError(
                f"messages carry NumPy arrays and torch tensors, not {type(array).__name__}; wrap it with numpy.asarray"
            )
    if writable and not buffer.writable:
        raise CommError(
            "a read-only array cannot take a result; pass a copy of it, or another array as out"
        )
    return buffer


def _from_numpy(array: NDArray[Any]) -> Buffer:
    element = element_of(array.dtype)
    check_memory(element, array.flags.c_contiguous, array.shape, "numpy.ascontiguousarray")
    if not array.dtype.isnative:
        raise CommError(
            f"an array of byte order {array.dtype.str!r} cannot be summed; convert it with .astype({element!r})"
        )
    flat = array.reshape(-1)
    return Buffer(
        element, flat, flat.view(np.uint8), flat.size, flat.itemsize, array.flags.writeable
    )


def _from_torch(tensor: Any) -> Buffer:
    if tensor.device.type != "cpu":
        raise CommError(_no_device(f"a tensor on {tensor.device}"))
    element = element_of(tensor.dtype)
    check_memory(element, tensor.is_contiguous(), tuple(tensor.shape), ".contiguous()")
    flat = tensor.detach().reshape(-1)
    if element != "bfloat16":
        return _from_numpy(flat.numpy())
    # int16 has its size, and NumPy knows it: the memory stays the same.
    octets = flat.view(sys.modules["torch"].int16).numpy().view(np.uint8)
    return Buffer(element, flat, octets, flat.numel(), 2)


def check_memory(element: str, contiguous: bool, shape: tuple[int, ...], remedy: str) -> None:
    """Raise CommError for an element type that can't travel, or memory with gaps; `remedy` closes them."""
    if element not in ELEMENTS:
        raise CommError(
            f"elements of type {element} cannot travel; convert to one of {', '.join(ELEMENTS)}"
        )
    if not contiguous:
        raise CommError(
            f"a message needs C-contiguous memory, this array of shape {shape} has gaps; make it so with {remedy}"
        )


def _no_device(what: str) -> str:
    return (
        f"messages carry memory of the CPU, this is {what}; copy it with .cpu() first. Collectives take a GPU's, too, "
        "for array and out alike"
    )
