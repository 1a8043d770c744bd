"""Bring tensors to the host for a file, and back: a GPU's through pinned memory, piece by piece."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mpillm.weights.slices import Array, raw

# Long against the start-up of a copy (10 µs), short against a host's memory.
PIECE_BYTES = 32 << 20


def on_host(tensor: Tensor) -> bool:
    """Return whether NumPy can share the tensor's memory."""
    return tensor.device.type == "cpu"


def host_pieces(tensor: Tensor, piece_bytes: int = PIECE_BYTES) -> Iterator[Array]:
    """Yield the tensor's values in row-major order, in flat or whole arrays of the stored dtype.

    A tensor of the host is one array, without a copy where it is contiguous. Of a GPU's tensor a
    piece is copied while the caller uses the one before; an array is valid until the next one.
    """
    if on_host(tensor):
        yield raw(tensor.contiguous())[1]
        return
    flat = tensor.detach().contiguous().view(-1)
    pieces = torch.split(flat, max(1, piece_bytes // flat.element_size()))
    arriving: tuple[Tensor, torch.cuda.Event | None] | None = None
    # Two buffers: one is filled, one is in use.
    buffers = [_pinned(pieces[0]) for _ in pieces[:2]]
    for number, piece in enumerate(pieces):
        target = buffers[number % 2][: piece.numel()]
        target.copy_(piece, non_blocking=True)
        began = target, _mark(piece)
        if arriving is not None:
            yield _arrived(arriving)
        arriving = began
    if arriving is not None:
        yield _arrived(arriving)


def host_copy(tensor: Tensor) -> Tensor:
    """Return a tensor of the host to fill in place of `tensor`: itself, where it is there."""
    # Not pinned: torch keeps pinned memory for later, and a whole tensor of it is too much to keep.
    # Disks are slower than copies of other memory.
    return tensor if on_host(tensor) else torch.empty(tensor.shape, dtype=tensor.dtype)


def _pinned(like: Tensor) -> Tensor:
    # A copy from or to other memory of the host would take place in the call.
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=torch.cuda.is_available())


def _mark(tensor: Tensor) -> "torch.cuda.Event | None":
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(tensor.device))
    return event


def _arrived(piece: "tuple[Tensor, torch.cuda.Event | None]") -> Array:
    values, event = piece
    if event is not None:
        event.synchronize()
    return raw(values)[1]
