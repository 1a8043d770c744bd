"""A task's cross-entropy mixed with the divergence from a teacher, in chunks of positions.

The loss is (1 − α) · cross-entropy + α · T² · KL(p ‖ q), where p and q are the softmax of the
teacher's and of the student's logits over the temperature T (Hinton et al. 2015, section 2). T²
keeps the size of its gradients, α · T · (q − p), when T changes.

Shapes: as in `chunked_cross_entropy`; v tokens of a shard of the vocabulary, V without shards.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mpillm.models.head_chunks import tile_positions
from mpillm.models.linear_head import LinearHead, VocabularyShard
from mpillm.tasks.chunked_cross_entropy import ChunkSums, attached
from mpillm.tasks.distillation.teacher_rows import TeacherRows
from mpillm.tasks.shard_losses import LossTerms

# Rows of the sums over the vocabulary, each of logits less the largest one. SOFT: of exponentials
# at the temperature.
TARGET, EXPONENTIAL, LOGITS, SOFT = range(4)


class LossMix(NamedTuple):
    """How the loss is mixed."""

    alpha: float
    temperature: float
    terms: LossTerms = LossTerms(0.0, 0.0)
    """Of the cross-entropy."""

    def mixed(self, task_n1: Tensor, divergence_n1: Tensor) -> Tensor:
        """Return the losses, and the two parts before their factors, (n, 3)."""
        factor = self.alpha * self.temperature**2
        total_n1 = (1 - self.alpha) * task_n1 + factor * divergence_n1
        return torch.cat([total_n1, task_n1, divergence_n1], 1)


class MixedLoss(NamedTuple):
    """A summed loss with its gradient, and its parts without: the cross-entropy, the divergence."""

    loss: Tensor
    parts: Tensor


def mixed_loss_sum(
    output: Tensor | LinearHead,
    teacher: TeacherRows,
    targets_BT: Tensor,
    counts_BT: Tensor | None,
    mixture: LossMix,
) -> MixedLoss:
    """Sum the mixed loss over all positions, in nats.

    `output`: logits (…, V), or a head, which is read in chunks. `counts_BT`: the weight of each
    position; None: 1. Of a head with a shard of the vocabulary it is the loss over the whole one.
    """
    if isinstance(output, LinearHead):
        head = output._replace(hidden_BTC=output.hidden_BTC.flatten(0, -2))
        sums = _MixedSums(head, teacher, mixture)
        sums.add_all(targets_BT, counts_BT)
        return MixedLoss(attached(sums, head), sums.parts)
    found_n3 = _plain_losses(output.flatten(0, -2), teacher, targets_BT, counts_BT, mixture)
    sums_3 = found_n3.sum(0)
    return MixedLoss(sums_3[0], sums_3[1:].detach())


def _plain_losses(
    logits_NV: Tensor,
    teacher: TeacherRows,
    targets_BT: Tensor,
    counts_BT: Tensor | None,
    mixture: LossMix,
) -> Tensor:
    """Return the losses and their parts of all positions, (N, 3), from few logits."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    targets_N, (smoothing, z_loss) = targets_BT.flatten(), mixture.terms
    if counts_BT is not None:
        targets_N = targets_N.masked_fill(counts_BT.flatten() == 0, 0)
    task_N = F.cross_entropy(logits_NV, targets_N, reduction="none", label_smoothing=smoothing)
    if z_loss:
        task_N = task_N + z_loss * logits_NV.logsumexp(1).square()
    log_NV = (logits_NV / mixture.temperature).log_softmax(1)
    divergence_N1 = _divergences(teacher.distribution(slice(None)), log_NV)
    found_N3 = mixture.mixed(task_N[:, None], divergence_N1)
    return found_N3 if counts_BT is None else found_N3 * counts_BT.flatten()[:, None]


def _divergences(probabilities_tv: Tensor, log_tv: Tensor) -> Tensor:
    """Sum p · (log p − log q) − p + q over the tokens, (t, 1); `log_tv`: log q.

    Sums of p and of q are 1, so that this is the divergence. No term of it is below 0, and an error
    of a normaliser has no effect of first order: where both are close, digits stay.
    """
    # An impossible token adds q, and the logarithm of 0 times 0 is NaN.
    least = torch.finfo(probabilities_tv.dtype).tiny
    ratios_tv = probabilities_tv.clamp(min=least).log_() - log_tv
    terms_tv = ratios_tv.sub_(1) * probabilities_tv + log_tv.exp()
    return terms_tv.sum(1, keepdim=True)


class _MixedSums(ChunkSums):
    """The sums of the mixed loss, whose parts are the cross-entropy and the divergence."""

    def __init__(self, head: LinearHead, teacher: TeacherRows, mixture: LossMix) -> None:
        super().__init__(head, mixture.terms, parts=2)
        self._teacher, self._mixture = teacher, mixture

    def losses_of(
        self, chunk: slice, logits_nV: Tensor, targets_n1: Tensor, gradients: bool
    ) -> Tensor:
        probabilities_nV = self._teacher.distribution(chunk)
        shard = self._head.shard
        if shard is not None:
            own = slice(shard.first, shard.first + logits_nV.shape[1])
            probabilities_nV, targets_n1 = probabilities_nV[:, own], targets_n1 - shard.first
        made = _Chunk(logits_nV, probabilities_nV, targets_n1, self._mixture, shard)
        divergence_n1 = made.divergence()
        if gradients:
            made.replace_logits()
        return self._mixture.mixed(made.task_losses(), divergence_n1)


class _Chunk:
    """The logits of a chunk that a head has, or its shard of them, and the teacher's there.

    Targets are numbers of the head's tokens; those of other heads are outside.
    """

    def __init__(
        self,
        logits_nv: Tensor,
        probabilities_nv: Tensor,
        targets_n1: Tensor,
        mixture: LossMix,
        shard: VocabularyShard | None,
    ) -> None:
        self._logits, self._probabilities = logits_nv, probabilities_nv
        self._mixture, self._shard = mixture, shard
        count, tokens = logits_nv.shape
        self._vocabulary = tokens if shard is None else shard.vocabulary
        self._wide = torch.promote_types(logits_nv.dtype, torch.float32)
        self._inside = (targets_n1 >= 0) & (targets_n1 < tokens)
        self._places = targets_n1.clamp(0, tokens - 1)
        self._largest = logits_nv.amax(1, keepdim=True).to(self._wide)
        if shard is not None:
            shard.maximum(self._largest)
        tiles = tile_positions(count, tokens, logits_nv.device.type)
        self._tiles = [slice(first, first + tiles) for first in range(0, count, tiles)]
        self._sums = self._summed()

    def _below(self, tile: slice) -> Tensor:
        """Return the logits of a tile less the largest one: a copy that stays in the cache."""
        return self._logits[tile].to(self._wide) - self._largest[tile]

    def _summed(self) -> Tensor:
        """Sum over the vocabulary of all heads, (4, n)."""
        sums_4n = self._largest.new_zeros((4, len(self._largest)))
        for tile in self._tiles:
            below_tv = self._below(tile)
            own_t1 = below_tv.gather(1, self._places[tile])
            sums_4n[TARGET, tile] = torch.where(self._inside[tile], own_t1, 0)[:, 0]
            sums_4n[LOGITS, tile] = below_tv.sum(1)
            sums_4n[SOFT, tile] = (below_tv / self._mixture.temperature).exp_().sum(1)
            sums_4n[EXPONENTIAL, tile] = below_tv.exp_().sum(1)
        if self._shard is not None:
            self._shard.total(sums_4n)
        return sums_4n

    def task_losses(self) -> Tensor:
        """Return the cross-entropy with its terms, (n, 1), the same for each head."""
        smoothing, z_loss = self._mixture.terms
        target_n1, sum_n1, mean_n1, _ = (row[:, None] for row in self._sums)
        log_n1, mean_n1 = sum_n1.log(), mean_n1 / self._vocabulary
        task_n1: Tensor = (1 - smoothing) * (log_n1 - target_n1) + smoothing * (log_n1 - mean_n1)
        task_n1 += z_loss * (log_n1 + self._largest).square()
        return task_n1

    def divergence(self) -> Tensor:
        """Return KL(p ‖ q) at the temperature, (n, 1), the same for each head."""
        log_soft_n1, found_n1 = self._sums[SOFT, :, None].log(), torch.empty_like(self._largest)
        for tile in self._tiles:
            log_tv = self._below(tile).div_(self._mixture.temperature).sub_(log_soft_n1[tile])
            found_n1[tile] = _divergences(self._probabilities[tile], log_tv)
        if self._shard is not None:
            self._shard.total(found_n1)
        return found_n1

    def replace_logits(self) -> None:
        """Replace the logits by their gradients of the mixed loss."""
        alpha, temperature, (smoothing, z_loss) = self._mixture
        _, sum_n1, _, soft_n1 = (row[:, None] for row in self._sums)
        slope_n1 = 1 + 2 * z_loss * (sum_n1.log() + self._largest)
        hard_n1 = (1 - alpha) * slope_n1 / sum_n1
        share = (1 - alpha) * smoothing / self._vocabulary
        at_target_n1 = -(1 - alpha) * (1 - smoothing) * self._inside.to(self._wide)
        for tile in self._tiles:
            below_tv = self._below(tile)
            slopes_tv = (below_tv / temperature).exp_().div_(soft_n1[tile])
            slopes_tv.sub_(self._probabilities[tile]).mul_(alpha * temperature)
            slopes_tv.add_(below_tv.exp_().mul_(hard_n1[tile]))
            if share:
                slopes_tv -= share
            # In float32: a probability near 1 less 1 loses its digits in 16 bits.
            slopes_tv.scatter_add_(1, self._places[tile], at_target_n1[tile])
            self._logits[tile] = slopes_tv
