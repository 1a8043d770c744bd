"""Compute the 2-norm of all gradients, bitwise the same in every layout.

Squares are summed in float64 over pieces whose bounds depend on the parameters alone. The sums of
the pieces are added exactly. So the number of ranks and their order do not change the result.
"""

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mpillm.parallel.data.gradient_sync import GradientSync

if TYPE_CHECKING:
    from mpi4py import MPI


def square_sums(pieces: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of each flat piece: a float64 tensor on their device, on which the
    host has not waited.
    """
    if not pieces:
        return torch.zeros(0, dtype=torch.float64)
    if pieces[0].is_cuda:
        # Few kernels for all. Norms in float32 are squared in float64.
        return torch.stack(torch._foreach_norm(list(pieces))).double().square()
    return torch.stack([_square_sum(piece) for piece in pieces])


def _square_sum(piece: Tensor) -> Tensor:
    # float64: squares of float32 gradients neither overflow nor underflow there.
    wide = piece.double()
    return torch.dot(wide, wide)


def gradient_norm(
    sync: GradientSync,
    comm: "MPI.Intracomm",
    replica: tuple[int, int],
    excluded: Collection[nn.Parameter] = (),
    squares: Sequence[float] | None = None,
) -> float:
    """Return the norm over all ranks of `comm`, the same on each. Every rank calls it, after
    `sync.finish`.

    `replica` and `excluded`: see `GradientSync.counted_gradients`. `squares`: the `square_sums` of
    these, where they are on the host already.
    """
    own = squares
    if own is None:
        own = square_sums(sync.counted_gradients(replica, excluded)).tolist()
    # math.fsum rounds the exact sum once: any distribution of the pieces gives the same bits.
    return math.sqrt(math.fsum(square for squares in comm.allgather(own) for square in squares))


def clip_gradients_(
    sync: GradientSync,
    comm: "MPI.Intracomm",
    replica: tuple[int, int],
    max_norm: float,
    excluded: Collection[nn.Parameter] = (),
    loss_scale: float = 1.0,
    max_value: float = math.inf,
    squares: Sequence[float] | None = None,
) -> float:
    """Divide all gradients by `loss_scale`, clamp each element to ± `max_value`, then scale all to
    a norm of `max_norm` at most.

    Returns the norm that they had before both. One that is not finite changes nothing: the caller
    reports it. Every rank of `comm` calls it, after all sums. `squares`: as in `gradient_norm`.
    """
    # Every rank computes the same norm, so all clip alike without another message.
    norm = left = gradient_norm(sync, comm, replica, excluded, squares) / loss_scale
    if not math.isfinite(norm):
        return norm
    # No element is larger than the norm.
    if norm > max_value:
        # A scale is a power of two: this is the same clamp after the division.
        sync.clamp_(max_value * loss_scale)
        if norm > max_norm:
            left = gradient_norm(sync, comm, replica, excluded) / loss_scale
    factor = (max_norm / left if left > max_norm else 1.0) / loss_scale
    if factor != 1.0:
        sync.scale_(factor)
    return norm
