"""Cross-entropy of a linear head in chunks of positions: the logits never exist as a whole.

The gradients are computed with the loss, chunk by chunk, in three matrix products. The backward
pass only multiplies them by the gradient of the loss, so no chunk's logits are kept.

Shapes: N positions (B · T), n those of a chunk, p and t those of its parts, C width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpillm.models.head_chunks import chunk_positions, tile_positions
from mpillm.models.linear_head import LinearHead
from mpillm.tasks.shard_losses import LossTerms, shard_losses

# Rows of the weight at a time: a CPU adds 16 bits to float32 by way of a float32 copy.
NARROW_ROWS = 4096
# Positions that a product in float16 adds up. It ends at 65,504, which hidden states of 32 reach
# with 2,048 targets of one token.
FLOAT16_POSITIONS = 2048


def chunked_cross_entropy(
    head: LinearHead,
    targets_BT: Tensor,
    counts_BT: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum the cross-entropy of `head` over all positions, in nats: a float32 scalar.

    The arguments are those of `cross_entropy_sum`. Products are in the dtype of the hidden states;
    the softmax and the sums over chunks are in float32. Without gradients the loss alone is
    computed. Nothing waits for the device. Of a head with a shard of the vocabulary it is the loss
    over the whole one; the gradient of its hidden states is the shard's share.
    """
    head = head._replace(hidden_BTC=head.hidden_BTC.flatten(0, -2))
    sums = ChunkSums(head, LossTerms(label_smoothing, z_loss))
    sums.add_all(targets_BT, counts_BT)
    return attached(sums, head)


def attached(sums: "ChunkSums", head: LinearHead) -> Tensor:
    """Return the summed loss with its known gradients for the tensors of `head`."""
    loss = sums.loss
    # The hidden states are attached last. A split backward pass walks from the loss to them. The
    # weights are then on a branch, which it walks once, in its second half (split_backward.py).
    for number in reversed(range(len(head.tensors))):
        gradient, tensor = sums.gradients[number], head.tensors[number]
        if gradient is not None:
            loss = _KnownGradient.apply(loss, tensor, gradient, number == 0)  # type: ignore[no-untyped-call]
    return loss


def chunked_losses(head: LinearHead, targets_BT: Tensor, counts_BT: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of `head` at each position, in the shape of `targets_BT`, float32.

    The arguments are those of `chunked_cross_entropy`. There are no gradients.
    """
    plain = head._replace(hidden_BTC=head.hidden_BTC.detach().flatten(0, -2))
    with torch.no_grad():
        sums = ChunkSums(plain, LossTerms(0.0, 0.0))
    losses_N = sums.loss.new_empty(targets_BT.numel())
    sums.add_all(targets_BT, counts_BT, losses_N)
    return losses_N.view(targets_BT.shape)


class ChunkSums:
    """The sums over all chunks: the loss, and the gradients.

    `losses_of` is the loss of one chunk. `parts`: what else a subclass sums there, (k,).
    """

    def __init__(self, head: LinearHead, terms: LossTerms, parts: int = 0) -> None:
        self._terms, device, dtype = terms, head.hidden_BTC.device, head.hidden_BTC.dtype
        # float32 for 16 bits too. float64 stays as it is, for tests by finite differences.
        self._wide = torch.promote_types(dtype, torch.float32)
        self.loss = torch.zeros((), dtype=self._wide, device=device)
        self.parts = torch.zeros(parts, dtype=self._wide, device=device)
        enabled, dtypes = torch.is_grad_enabled(), (dtype, self._wide, self._wide)
        self.gradients = [
            torch.empty(tensor.shape, dtype=summed, device=device)
            if enabled and tensor is not None and tensor.requires_grad
            else None
            for tensor, summed in zip(head.tensors, dtypes, strict=True)
        ]
        """Of the head's tensors, where the loss has the gradient 1; None where none is required."""
        bias_V = None if head.bias_V is None else head.bias_V.detach().to(dtype)
        self._head = LinearHead(
            head.hidden_BTC.detach(),
            head.weight_VC.detach().to(dtype),
            bias_V,
            head.soft_cap,
            head.shard,
        )

    def add_all(
        self, targets_BT: Tensor, counts_BT: Tensor | None, losses_N: Tensor | None = None
    ) -> None:
        """Add every chunk, in the order of positions; set `losses_N`, where it is given."""
        targets_N, counts_N = targets_BT.flatten(), None
        if counts_BT is not None:
            counts_N = counts_BT.flatten()
            targets_N = targets_N.masked_fill(counts_N == 0, 0)
        # The dtypes are chosen here: autocast must not change them.
        with torch.no_grad(), torch.autocast(targets_N.device.type, enabled=False):
            self._add_chunks(targets_N, counts_N, losses_N)

    def _add_chunks(
        self, targets_N: Tensor, counts_N: Tensor | None, losses_N: Tensor | None
    ) -> None:
        hidden_NC, weight_VC, bias_V = self._head.tensors
        total, vocabulary, device = len(targets_N), len(weight_VC), hidden_NC.device
        # Heads that share a vocabulary have chunks of the same positions.
        most = vocabulary if self._head.shard is None else self._head.shard.most
        count = chunk_positions(total, most, device.type)
        # Allocated once: memory that is freed and allocated again may be faulted in again.
        buffer_nV = torch.empty((count, vocabulary), dtype=hidden_NC.dtype, device=device)
        # One empty chunk where there are no positions: it sets gradients of zero.
        for first in range(0, max(1, total), count):
            chunk = slice(first, min(first + count, total))
            counts_n1 = None if counts_N is None else counts_N[chunk, None].to(self._wide)
            logits_nV = buffer_nV[: chunk.stop - first]
            if bias_V is None:
                torch.mm(hidden_NC[chunk], weight_VC.t(), out=logits_nV)
            else:
                torch.addmm(bias_V, hidden_NC[chunk], weight_VC.t(), out=logits_nV)
            losses_n1 = self._add_losses(chunk, logits_nV, targets_N[chunk, None], counts_n1)
            if losses_N is not None:
                losses_N[chunk] = losses_n1.squeeze(1)

    def _add_losses(
        self, chunk: slice, logits_nV: Tensor, targets_n1: Tensor, counts_n1: Tensor | None
    ) -> Tensor:
        """Add a chunk's losses and parts; add the gradients where they are wanted. Returns the
        losses (n, 1).
        """
        gradients = any(gradient is not None for gradient in self.gradients)
        slopes_nV = cap_logits(logits_nV, self._head.soft_cap, gradients)
        found_nk = self.losses_of(chunk, logits_nV, targets_n1, gradients)
        if counts_n1 is not None:
            found_nk = found_nk * counts_n1
        losses_n1 = found_nk[:, :1]
        self.loss += losses_n1.sum()
        self.parts += found_nk[:, 1:].sum(0)
        if gradients:
            if slopes_nV is not None:
                logits_nV *= slopes_nV
            self._add_gradients(chunk, logits_nV, counts_n1)
        return losses_n1

    def losses_of(
        self, chunk: slice, logits_nV: Tensor, targets_n1: Tensor, gradients: bool
    ) -> Tensor:
        """Return the losses of a chunk of positions, (n, 1), and its parts in further columns.

        With `gradients` the logits are replaced by theirs.
        """
        given, shard = (logits_nV, targets_n1, self._terms, gradients), self._head.shard
        return _losses(*given) if shard is None else shard_losses(*given, shard)

    def _add_gradients(self, chunk: slice, grad_nV: Tensor, counts_n1: Tensor | None) -> None:
        """Add the products with `grad_nV`, the gradients of a chunk's logits."""
        hidden_NC, weight_VC, bias_V = self.gradients
        states_nC = self._head.hidden_BTC[chunk]
        if hidden_NC is not None:
            torch.mm(grad_nV, self._head.weight_VC, out=hidden_NC[chunk])
        if counts_n1 is not None:
            # Counts multiply the C columns of the products: fewer than V.
            states_nC = states_nC * counts_n1.to(states_nC.dtype)
            if hidden_NC is not None:
                hidden_NC[chunk] *= counts_n1
        # The first chunk overwrites what empty memory held.
        kept = chunk.start > 0
        if weight_VC is not None and weight_VC.dtype == grad_nV.dtype:
            weight_VC.addmm_(grad_nV.t(), states_nC, beta=float(kept))
        elif weight_VC is not None:
            _add_narrow(weight_VC, grad_nV, states_nC, kept)
        if bias_V is not None:
            counted_nV = grad_nV if counts_n1 is None else grad_nV * counts_n1
            sum_V = counted_nV.sum(0, dtype=self._wide)
            bias_V.add_(sum_V) if kept else bias_V.copy_(sum_V)


def cap_logits(logits_nV: Tensor, soft_cap: float, gradients: bool) -> Tensor | None:
    """Cap the logits of a chunk in place; return the slopes of the capped ones for `gradients`."""
    if not soft_cap:
        return None
    logits_nV.div_(soft_cap).tanh_()
    # In place: one more chunk, not two.
    slopes_nV = logits_nV.square().neg_().add_(1) if gradients else None
    logits_nV.mul_(soft_cap)
    return slopes_nV


def _add_narrow(sum_VC: Tensor, grad_nV: Tensor, states_nC: Tensor, kept: bool) -> None:
    """Add a product in 16 bits to a float32 sum; overwrite the sum unless it is `kept`.

    Each product is rounded once, the sum over chunks is not.
    """
    count = NARROW_ROWS if sum_VC.device.type == "cpu" else len(sum_VC)
    positions = FLOAT16_POSITIONS if grad_nV.dtype == torch.float16 else max(1, len(grad_nV))
    for begin in range(0, max(1, len(grad_nV)), positions):
        grad_pV, states_pC = (each[begin : begin + positions] for each in (grad_nV, states_nC))
        for first in range(0, len(sum_VC), count):
            part = slice(first, first + count)
            product_RC = torch.mm(grad_pV[:, part].t(), states_pC)
            sum_VC[part].add_(product_RC) if kept or begin else sum_VC[part].copy_(product_RC)


def _losses(logits_nV: Tensor, targets_n1: Tensor, terms: LossTerms, gradients: bool) -> Tensor:
    """Return the losses of a chunk (n, 1). With `gradients` its logits are replaced by theirs."""
    smoothing, z_loss = terms
    wide, vocabulary = torch.promote_types(logits_nV.dtype, torch.float32), logits_nV.shape[1]
    target_n1 = logits_nV.gather(1, targets_n1).to(wide)
    log_z_n1, mean_n1 = torch.empty_like(target_n1), torch.empty_like(target_n1)
    count = tile_positions(len(logits_nV), vocabulary, logits_nV.device.type)
    # Wide logits serve as their own buffer.
    narrow = logits_nV.dtype != wide
    spare_tV = logits_nV.new_empty((count, vocabulary), dtype=wide) if narrow else None
    for first in range(0, len(logits_nV), count):
        tile = slice(first, first + count)
        tile_tV = logits_nV[tile]
        wide_tV = tile_tV if spare_tV is None else spare_tV[: len(tile_tV)]
        _softmax(tile_tV, wide_tV, log_z_n1[tile], mean_n1[tile], terms, gradients)
    losses_n1 = (1 - smoothing) * (log_z_n1 - target_n1)
    if smoothing:
        losses_n1 += smoothing * (log_z_n1 - mean_n1)
    if z_loss:
        losses_n1 += z_loss * log_z_n1.square()
    if gradients:
        # Each target's own, in float32: a probability near 1 less 1 loses its digits in 16 bits.
        own_n1 = (target_n1 - log_z_n1).exp() * (1 + 2 * z_loss * log_z_n1)
        own_n1 -= 1 - smoothing + smoothing / vocabulary
        logits_nV.scatter_(1, targets_n1, own_n1.to(logits_nV.dtype))
    return losses_n1


def _softmax(
    logits_tV: Tensor,
    wide_tV: Tensor,
    log_z_t1: Tensor,
    mean_t1: Tensor,
    terms: LossTerms,
    gradients: bool,
) -> None:
    """Set log Z and the mean logit of each position of a tile.

    With `gradients` the logits are replaced by theirs, but for the targets' part. `wide_tV`: memory
    in float32, which may be that of the logits.
    """
    smoothing, z_loss = terms
    largest_t1 = logits_tV.amax(1, keepdim=True).to(wide_tV.dtype)
    torch.sub(logits_tV, largest_t1, out=wide_tV)
    if smoothing:
        torch.add(wide_tV.mean(1, keepdim=True), largest_t1, out=mean_t1)
    sum_t1 = wide_tV.exp_().sum(1, keepdim=True)
    torch.add(sum_t1.log(), largest_t1, out=log_z_t1)
    if not gradients:
        return
    factor_t1 = (1 + 2 * z_loss * log_z_t1) / sum_t1
    torch.mul(wide_tV, factor_t1, out=wide_tV if smoothing else logits_tV)
    if smoothing:
        torch.sub(wide_tV, smoothing / wide_tV.shape[1], out=logits_tV)


class _KnownGradient(torch.autograd.Function):
    """A loss that depends on a tensor with a known gradient.

    Its value is that of `loss`. `reused`: the backward pass may run several times, as both halves
    of a split one do. Otherwise the gradient is multiplied in place, without a second one's memory.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, tensor: Tensor, gradient: Tensor, reused: bool) -> Tensor:
        ctx.gradient, ctx.dtype, ctx.reused = gradient, tensor.dtype, reused
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gradient = ctx.gradient
        assert gradient is not None, "the gradient of a weight was used up by a backward pass"
        if ctx.reused:
            # In float32: a factor such as 1 / (all targets) is denormal in float16.
            return factor, (gradient.to(factor.dtype) * factor).to(ctx.dtype), None, None
        # Autograd takes it as the weight's `grad` only where nothing else refers to it.
        ctx.gradient = None
        return factor, gradient.mul_(factor).to(ctx.dtype), None, None
