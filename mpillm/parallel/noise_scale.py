"""The gradient noise scale: how large a batch has to be before its gradient stops improving.

Source: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", appendix A.1.
"""

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import nn

from mpillm.comm.mesh import Mesh
from mpillm.parallel.data.buckets import norm_pieces
from mpillm.parallel.data.gradient_sync import Gradients, GradientSync
from mpillm.parallel.grad_norm import square_sums
from mpillm.parallel.step_plan import StepPlan, replica_share

if TYPE_CHECKING:
    from mpi4py import MPI


class NoiseMeter:
    """Squared norms of the gradients of small batches, and of their sum.

    The small batches of a step are the shares of the data ranks; with one data rank they are its
    microbatches. Every rank of `mesh` makes it for one step, and passes `add` to
    `GradientSync.begin`.
    """

    def __init__(self, mesh: Mesh, plan: StepPlan, excluded: Collection[nn.Parameter]) -> None:
        """`excluded`: the leaves of tied weights.

        The gradient of a small batch is the sum over its leaves. They may be on different ranks,
        and only the sum over all small batches is exchanged. So tied weights are left out in every
        layout, and the value is the same in all.
        """
        self._mesh, self._excluded = mesh, excluded
        data = mesh.axis("data").size
        self._batches = data if data > 1 else plan.microbatches
        self._rows = data * plan.rows
        # Ranks that differ along the data axis have different small batches: each counts.
        self._share = replica_share(mesh, apart=("data",))
        self._small: list[float] = []

    def add(self, gradients: Gradients) -> None:
        """Add the squares of gradients of one small batch, or of a part of the model in it."""
        pieces = norm_pieces(gradients, self._excluded)
        rank, ranks = self._share
        own = pieces[len(pieces) * rank // ranks : len(pieces) * (rank + 1) // ranks]
        self._small += square_sums(own).tolist()

    def noise_scale(self, sync: GradientSync, comm: "MPI.Intracomm") -> float | None:
        """Return the noise scale in sequences; None where the gradient is lost in its noise.

        Every rank of the mesh calls it, after `sync.finish`.
        """
        pieces = sync.counted_gradients(replica_share(self._mesh), self._excluded)
        every = comm.allgather((self._small, square_sums(pieces).tolist()))
        # math.fsum rounds the exact sum once: any distribution of the pieces gives the same bits.
        small, whole = (
            math.fsum(square for squares in of_ranks for square in squares)
            for of_ranks in zip(*every, strict=True)
        )
        return simple_noise_scale(small, whole, self._batches, self._rows)


def simple_noise_scale(small: float, whole: float, batches: int, rows: int) -> float | None:
    """Return B_simple = tr(Σ) / |G|² in sequences; None where the estimate of |G|² is not positive.

    `small`: the sum of |gᵢ|² over the small batches, where the gradient of the whole batch of
    `rows` sequences is the sum of all gᵢ. `whole`: its squared norm.
    """
    # A small batch has the mean gradient `batches` · gᵢ. Both estimates are free of bias.
    mean = batches * small
    square = (batches * whole - mean) / (batches - 1)
    variance = rows * (mean - whole) / (batches - 1)
    return variance / square if square > 0 and math.isfinite(variance) else None
