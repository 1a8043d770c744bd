"""Arrays that messages carry: C-contiguous NumPy arrays and torch CPU tensors, as flat buffers.

A Buffer shares its array's memory. Messages carry bytes, so that all element types are handled
alike: MPI has no bfloat16, and most libraries no float16. The compiled kernel does the arithmetic,
16-bit floats in float32. Nothing here loads torch, except for a bfloat16 buffer made from bare
bytes.
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
# The kernel takes indices into these two, so their order is that of arithmetic.h.
ELEMENTS = (*FLOATS, *WHOLE)
REDUCTIONS = ("sum", "max", "min")
# MPI's classic interface counts to 2³¹ − 1, and some libraries err near it: no call of MPI gets
# more elements.
LARGEST_COUNT = 2**30


@dataclass(frozen=True)
class Buffer:
    """An array's memory as one flat row of elements."""

    element: str
    """One of ELEMENTS."""
    flat: Any
    """1-dim NumPy array; a torch tensor for bfloat16, which NumPy lacks."""
    octets: NDArray[np.uint8]
    """The same memory as bytes."""
    count: int
    itemsize: int
    """Bytes of one element."""
    writable: bool = True

    @property
    def code(self) -> int:
        """The element type's number in the kernel."""
        return ELEMENTS.index(self.element)

    def raw(self, first: int, stop: int) -> NDArray[np.uint8]:
        """Return the bytes of elements `first` to `stop`, for MPI to send or receive."""
        return self.octets[first * self.itemsize : stop * self.itemsize]

    def part(self, first: int, stop: int) -> "Buffer":
        """Return elements `first` to `stop` as a Buffer of the same memory."""
        return Buffer(
            self.element,
            self.flat[first:stop],
            self.raw(first, stop),
            stop - first,
            self.itemsize,
            self.writable,
        )

    def combining(self, op: str, first: int, stop: int) -> Callable[[NDArray[np.uint8]], object]:
        """Prepare self[first:stop] = self[first:stop] op other, as a call that takes the bytes of
        `other` any number of times.

        `op` is one of REDUCTIONS; `other` has the same element type and length.
        """
        own = self.raw(first, stop)
        return functools.partial(kernel.combine, self.code, REDUCTIONS.index(op), own)

    def scale(self, factor: float) -> None:
        """Multiply all elements by `factor`, in place; floats only."""
        kernel.scale(self.code, self.octets, factor)

    def empty(self, count: int) -> "Buffer":
        """Allocate `count` elements of the same type, their contents undefined."""
        return from_octets(new_scratch(count * self.itemsize), self.element)


def new_octets(nbytes: int, place: int = 0) -> NDArray[np.uint8]:
    """Allocate memory that begins `place` bytes within a page; its contents are undefined."""
    memory = np.empty(nbytes + PAGE_BYTES, np.uint8)
    start = (place - memory.ctypes.data) % PAGE_BYTES
    return memory[start : start + nbytes]


# AMD EPYC copies at a third of its speed if target − source ≡ 1 … 31 modulo a page (`rep movsb`).
# Arrays begin near a page's start as a rule, so scratch begins half a page further.
new_scratch = functools.partial(new_octets, place=PAGE_BYTES // 2)


def message_spans(count: int) -> list[tuple[int, int]]:
    """Cut `count` elements into spans (first, stop) of one MPI call each; an empty array is one
    message, too.
    """
    firsts = range(0, max(count, 1), LARGEST_COUNT)
    return [(first, min(first + LARGEST_COUNT, count)) for first in firsts]


@functools.cache
def element_of(dtype: Any) -> str:
    """Return the name of a NumPy or torch element type; cached, because NumPy composes it each
    time.
    """
    return dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")


def itemsize_of(element: str) -> int:
    """Return the bytes of one element of that name."""
    return 2 if element == "bfloat16" else np.dtype(element).itemsize


def from_octets(octets: NDArray[np.uint8], element: str) -> Buffer:
    """View bytes as elements of type `element`: a torch tensor for bfloat16, else a NumPy array."""
    if element == "bfloat16":
        import torch

        return _from_torch(torch.from_numpy(octets.view(np.int16)).view(torch.bfloat16))
    return _from_numpy(octets.view(element))


def as_buffer(array: Any, writable: bool = True) -> Buffer:
    """View a C-contiguous NumPy array or torch CPU tensor of any shape as a flat Buffer, without a
    copy.

    Raises CommError for another kind of array, another element type, or gaps in its memory; and for
    a read-only array where it must be `writable`, to take a result.
    """
    if isinstance(array, Buffer):
        buffer = array
    elif isinstance(array, np.ndarray):
        buffer = _from_numpy(array)
    else:
        # The caller of a tensor has loaded torch; comm itself never does for NumPy arrays.
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(array, torch.Tensor):
            buffer = _from_torch(array)
        elif hasattr(array, "__cuda_array_interface__"):
            raise CommError(_no_device("a CUDA array"))
        else:
            raise CommError(
                f"messages carry NumPy arrays and torch tensors, not {type(array).__name__}; "
                "wrap it with numpy.asarray"
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
            f"an array of byte order {array.dtype.str!r} cannot be summed; convert it with "
            f".astype({element!r})"
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
    # NumPy lacks bfloat16 but has int16, of the same size: a view of the same memory.
    octets = flat.view(sys.modules["torch"].int16).numpy().view(np.uint8)
    return Buffer(element, flat, octets, flat.numel(), 2)


def check_memory(element: str, contiguous: bool, shape: tuple[int, ...], remedy: str) -> None:
    """Raise CommError for an unknown element type, or memory with gaps; `remedy` names the call
    that closes them.
    """
    if element not in ELEMENTS:
        raise CommError(
            f"elements of type {element} cannot travel; convert to one of {', '.join(ELEMENTS)}"
        )
    if not contiguous:
        raise CommError(
            f"a message needs C-contiguous memory, this array of shape {shape} has gaps; "
            f"close them with {remedy}"
        )


def _no_device(what: str) -> str:
    return (
        f"messages carry memory of the CPU, this is {what}; copy it with .cpu() first. "
        "Collectives take memory of a GPU, too, but then for both array and out"
    )
