"""The 2-norm of all gradients, the same bits in every layout.

Squares are summed in float64 over pieces that depend on the parameters alone, and the pieces' sums in exact arithmetic.
So neither the number of ranks nor the order leaves a trace.
"""

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mpillm.parallel.data.gradient_sync import GradientSync

if TYPE_CHECKING:
    from mpi4py import MPI


def square_sum(piece: Tensor) -> float:
    """Return the sum of squares of a flat `piece`, in float64."""
    wide = piece.double()
    return float(torch.dot(wide, wide))


def gradient_norm(
    sync: GradientSync,
    comm: "MPI.Intracomm",
    replica: tuple[int, int],
    excluded: Collection[nn.Parameter] = (),
) -> float:
    """Return the norm over all ranks of `comm`, the same on each. Every rank calls it, after `sync.finish`.

    `replica` and `excluded`: see `GradientSync.counted_gradients`.
    """
    own = [square_sum(piece) for piece in sync.counted_gradients(replica, excluded)]
    return math.sqrt(math.fsum(square for squares in comm.allgather(own) for square in squares))


def clip_gradients_(
    sync: GradientSync,
    comm: "MPI.Intracomm",
    replica: tuple[int, int],
    max_norm: float,
    excluded: Collection[nn.Parameter] = (),
) -> float:
    """Scale all gradients so that their norm is `max_norm` at most; return the norm that they had.

    A norm that is not finite scales nothing: the caller reports it. Every rank of `comm` calls it.
    """
    norm = gradient_norm(sync, comm, replica, excluded)
    if math.isfinite(norm) and norm > max_norm:
        sync.scale_(max_norm / norm)
    return norm
