"""T5's relative positions (Raffel et al. 2020): a learnt bias of scores for classes of distances.

Shapes: T positions, S positions attended to, H heads.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from mpillm.models.block_settings import BlockSettings


class RelativeBias(nn.Module):
    """A bias of each head for each bucket of distances, near ones apart and far ones together."""

    def __init__(self, config: BlockSettings, causal: bool) -> None:
        super().__init__()
        self.causal, self.distance = causal, config.relative_distance
        self.table = nn.Embedding(config.relative_buckets, config.heads)

    def forward(self, first: int, length: int) -> Tensor:
        """Return the bias (H, T, S) of `length` positions from `first` on; S = first + T."""
        last = first + length
        # One value a distance: the scores of all pairs of positions are views of this row.
        ahead_N = torch.arange(1 - last, length, device=self.table.weight.device)
        # Copied while it is small: fused kernels would copy all pairs to have rows of keys.
        values_HN = self.table(self.bucket_of(ahead_N)).T.contiguous()
        # The last position has the least distances.
        return cast(Tensor, values_HN.unfold(-1, last, 1).flip(1))

    def bucket_of(self, ahead_N: Tensor) -> Tensor:
        """Return the bucket of each number of positions that a key is ahead of its query.

        Without `causal` half of the buckets are for keys after the query. In each direction half
        of them are for one distance each, the others for ranges that grow as powers do.
        """
        buckets = self.table.num_embeddings
        after_N = torch.zeros_like(ahead_N)
        if not self.causal:
            buckets //= 2
            after_N = (ahead_N > 0) * buckets
        far_N = (-ahead_N).clamp(min=0) if self.causal else ahead_N.abs()
        exact = buckets // 2
        # In float32, as the published weights were trained: at bounds the result depends on it.
        log_N = torch.log(far_N.float() / exact) / math.log(self.distance / exact)
        ranges_N = exact + (log_N * (buckets - exact)).clamp(min=0).long()
        return after_N + torch.where(far_N < exact, far_N, ranges_N.clamp(max=buckets - 1))
