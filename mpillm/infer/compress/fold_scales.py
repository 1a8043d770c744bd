"""Divide the inputs of layers by factors, within what computes them.

A norm's weights, or the outputs of the layer ahead, take the factors up: the model has no other
layers afterwards, and computes the same up to rounding (Xiao et al. 2022, SmoothQuant).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mpillm.models.layers.attention import Attention
from mpillm.models.layers.block import BlockLayers
from mpillm.models.layers.feed_forward import FeedForward
from mpillm.models.layers.rms_norm import RMSNorm1p

Fold = Callable[[Tensor], None]


def fold_of(block: nn.Module, layers: Sequence[nn.Linear]) -> Fold | None:
    """Return what divides the inputs that `layers` share; None where nothing can take it up.

    `layers`: all that read them.
    """
    if not isinstance(block, BlockLayers):
        return None
    own = set(layers)
    attention, forward = block.attention, block.feed_forward
    # After a post-norm the residual connection reads the norm's output, too.
    if not block.post_norm and own == {attention.query, attention.key, attention.value}:
        return _fold_norm(block.attention_norm)
    if own == {attention.output}:
        return _fold_values(attention)
    if not isinstance(forward, FeedForward):
        return None
    if own == {forward.down}:
        # A gated unit multiplies by `up`, and a ReLU keeps positive factors.
        return _fold_outputs(forward.up) if forward.gate is not None or forward.relu else None
    inside = {forward.up} if forward.gate is None else {forward.up, forward.gate}
    return _fold_norm(block.forward_norm) if not block.post_norm and own == inside else None


def _fold_norm(norm: nn.Module) -> Fold | None:
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None

    @torch.no_grad()
    def fold(factor_I: Tensor) -> None:
        if isinstance(norm, RMSNorm1p):
            weight.copy_((1 + weight) / factor_I - 1)
        else:
            weight.div_(factor_I)
        bias = getattr(norm, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.div_(factor_I)

    return fold


def _fold_values(attention: Attention) -> Fold | None:
    # Heads that share values would share their factors.
    if attention.value.out_features != attention.output.in_features:
        return None
    return _fold_outputs(attention.value)


def _fold_outputs(layer: nn.Linear) -> Fold:
    @torch.no_grad()
    def fold(factor_I: Tensor) -> None:
        layer.weight.div_(factor_I[:, None])
        if layer.bias is not None:
            layer.bias.div_(factor_I)

    return fold
