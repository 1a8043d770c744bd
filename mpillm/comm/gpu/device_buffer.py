"""GPU memory as the collectives see it: flat rows of elements, the counterpart of buffers.py.

CuPy is loaded with the first array on a GPU, not earlier. It has no bfloat16: such arrays are
viewed as uint16, and summed by the kernels of device_arithmetic.py.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpillm.comm.buffers import Buffer
from mpillm.comm.gpu import device_arithmetic
from mpillm.errors import CommError


@dataclass(frozen=True)
class DeviceBytes:
    """GPU memory as a GPU-aware MPI takes it: an address and a length."""

    pointer: int
    size: int
    flat: Any
    """The 1-dim array of the same memory, as elements; it keeps the memory alive."""

    def __getitem__(self, octets: slice) -> "DeviceBytes":
        """Return a range of these bytes, of whole elements."""
        itemsize = int(self.flat.dtype.itemsize)
        first, stop, _ = octets.indices(self.size)
        flat = self.flat[first // itemsize : stop // itemsize]
        return DeviceBytes(self.pointer + first, stop - first, flat)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.size,),
            "typestr": "|u1",
            "data": (self.pointer, False),
            "strides": None,
            "version": 3,
        }


@dataclass(frozen=True)
class DeviceBuffer:
    """An array's memory on a GPU as one flat row of elements, with the methods of a Buffer."""

    element: str
    """One of ELEMENTS."""
    flat: Any
    """1-dim CuPy array; uint16 for bfloat16."""
    count: int
    pointer: int
    device: int
    current_stream: Callable[[], int]
    """Returns the handle of the stream on which the array's library works now."""
    library: Any
    """The module cupy; numpy where the CPU replaces a GPU (probe_child.py, tests)."""
    writable: bool = True

    @property
    def itemsize(self) -> int:
        return int(self.flat.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        return self.count * self.itemsize

    def at(self, first: int) -> int:
        """Return the address of element `first`."""
        return self.pointer + first * self.itemsize

    def raw(self, first: int, stop: int) -> DeviceBytes:
        """Return the bytes of elements `first` to `stop`, for MPI to send or receive."""
        return self.octets[first * self.itemsize : stop * self.itemsize]

    @property
    def octets(self) -> DeviceBytes:
        return DeviceBytes(self.pointer, self.nbytes, self.flat)

    def part(self, first: int, stop: int) -> "DeviceBuffer":
        """Return elements `first` to `stop` as a DeviceBuffer of their own."""
        return replace(self, flat=self.flat[first:stop], count=stop - first, pointer=self.at(first))

    def combining(self, op: str, first: int, stop: int) -> Callable[[DeviceBytes], object]:
        """Prepare self[first:stop] = self[first:stop] op other, as a call that takes the bytes of
        `other` any number of times.
        """
        return functools.partial(self._combine, op, self.flat[first:stop])

    def _combine(self, op: str, target: Any, source: DeviceBytes) -> None:
        """Combine on CuPy's current stream; the kernel has run when this returns, so that the sum
        may be sent.
        """
        device_arithmetic.combine(self.library, self.element, op, target, source.flat)
        self.settle()

    def scale(self, factor: float) -> None:
        """Multiply by `factor`, in place, on CuPy's current stream; floats only."""
        device_arithmetic.scale(self.library, self.element, self.flat, factor)

    def copy_from(self, source: "DeviceBuffer") -> None:
        """Overwrite all elements by `source`'s, on CuPy's current stream."""
        self.library.copyto(self.flat, source.flat)

    def settle(self) -> None:
        """Return when CuPy's current stream has done its work."""
        # NumPy in place of CuPy works at once.
        if self.library is not np:
            self.library.cuda.get_current_stream().synchronize()

    def empty(self, count: int) -> "DeviceBuffer":
        """Allocate `count` elements of the same type on the same GPU, contents undefined."""
        if self.library is np:
            flat: Any = np.empty(count, self.flat.dtype)
            return replace(
                self, flat=flat, count=count, pointer=int(flat.ctypes.data), writable=True
            )
        # CuPy allocates on its current device, which may be another than the array's.
        with self.library.cuda.Device(self.device):
            flat = self.library.empty(count, self.flat.dtype)
        return replace(self, flat=flat, count=count, pointer=int(flat.data.ptr), writable=True)


def load_cupy() -> Any:
    """Import cupy; raises CommError with the command that installs it."""
    try:
        import cupy
    except ImportError as failure:
        raise CommError(
            f"arrays on a GPU travel through CuPy, which cannot be loaded ({failure}); install "
            "mpillm[cuda12], or mpillm[cuda13] for CUDA 13, or copy the array to the CPU first"
        ) from failure
    return cupy


def is_on_device(array: Any) -> bool:
    """Return True for a torch CUDA tensor and for objects with `__cuda_array_interface__`."""
    # Arrays of the CPU first: they must pay nothing for GPUs.
    if array is None or isinstance(array, np.ndarray | Buffer):
        return False
    torch = sys.modules.get("torch")  # a caller with a tensor has loaded torch
    if torch is not None and isinstance(array, torch.Tensor):
        return bool(array.device.type == "cuda")
    return isinstance(array, DeviceBuffer) or hasattr(array, "__cuda_array_interface__")
