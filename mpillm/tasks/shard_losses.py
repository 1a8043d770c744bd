"""Losses of a chunk of positions whose logits several heads share by the tokens of the vocabulary.

The largest logits, the normalisers and the logits of targets are combined over the heads, in two
exchanges of a few numbers a position (Shoeybi et al. 2019, "Megatron-LM", section 3).

Shapes: n positions, t those of a tile, v tokens of a shard.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mpillm.models.head_chunks import tile_positions
from mpillm.models.linear_head import VocabularyShard


class LossTerms(NamedTuple):
    """What training adds to the cross-entropy: see `cross_entropy_sum`."""

    label_smoothing: float
    z_loss: float


def shard_losses(
    logits_nv: Tensor,
    targets_n1: Tensor,
    terms: LossTerms,
    gradients: bool,
    shard: VocabularyShard,
) -> Tensor:
    """Return the losses of a chunk (n, 1), the same for each head.

    With `gradients` the logits are replaced by theirs. Each head calls it for the same positions.
    """
    smoothing, z_loss = terms
    wide = torch.promote_types(logits_nv.dtype, torch.float32)
    places_n1 = targets_n1 - shard.first
    inside_n1 = (places_n1 >= 0) & (places_n1 < logits_nv.shape[1])
    places_n1 = places_n1.clamp(0, logits_nv.shape[1] - 1)
    found_n1 = logits_nv.gather(1, places_n1)
    largest_n1 = logits_nv.amax(1, keepdim=True).to(wide)
    shard.maximum(largest_n1)
    sums_3n = torch.zeros((3, len(logits_nv)), dtype=wide, device=logits_nv.device)
    sums_3n[0] = torch.where(inside_n1, found_n1.to(wide) - largest_n1, 0)[:, 0]
    _sum_tiles(logits_nv, largest_n1, sums_3n, bool(smoothing))
    shard.total(sums_3n)
    # All are less the largest logit, of which log Z alone is not a difference.
    target_n1, sum_n1, mean_n1 = (row[:, None] for row in sums_3n)
    log_n1, mean_n1 = sum_n1.log(), mean_n1 / shard.vocabulary
    log_z_n1 = log_n1 + largest_n1
    losses_n1: Tensor = (1 - smoothing) * (log_n1 - target_n1)
    if smoothing:
        losses_n1 += smoothing * (log_n1 - mean_n1)
    if z_loss:
        losses_n1 += z_loss * log_z_n1.square()
    if gradients:
        slope_n1 = 1 + 2 * z_loss * log_z_n1
        share = smoothing / shard.vocabulary
        _replace(logits_nv, log_z_n1, slope_n1, share)
        # Each target's own, in float32: a probability near 1 less 1 loses its digits in 16 bits.
        own_n1 = (target_n1 - log_n1).exp() * slope_n1 - (1 - smoothing + share)
        other_n1 = logits_nv.gather(1, places_n1)
        logits_nv.scatter_(1, places_n1, torch.where(inside_n1, own_n1.to(other_n1), other_n1))
    return losses_n1


def _sum_tiles(logits_nv: Tensor, largest_n1: Tensor, sums_3n: Tensor, means: bool) -> None:
    """Set the sums of exponentials and, for `means`, of the logits less the largest."""
    for tile in _tiles(logits_nv):
        # Copies of a tile stay in the second cache.
        wide_tv = logits_nv[tile].to(largest_n1.dtype) - largest_n1[tile]
        if means:
            sums_3n[2, tile] = wide_tv.sum(1)
        sums_3n[1, tile] = wide_tv.exp_().sum(1)


def _replace(logits_nv: Tensor, log_z_n1: Tensor, slope_n1: Tensor, share: float) -> None:
    """Replace logits by their gradients, but for the targets' part."""
    for tile in _tiles(logits_nv):
        wide_tv = (logits_nv[tile].to(log_z_n1.dtype) - log_z_n1[tile]).exp_()
        wide_tv *= slope_n1[tile]
        logits_nv[tile] = wide_tv - share if share else wide_tv


def _tiles(logits_nv: Tensor) -> list[slice]:
    positions, tokens = logits_nv.shape
    count = tile_positions(positions, tokens, logits_nv.device.type)
    return [slice(first, first + count) for first in range(0, positions, count)]
