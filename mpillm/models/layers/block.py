"""A Transformer block: norms, attention and feed-forward, joined by residual connections.

Shapes: B sequences, T positions, C width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mpillm.models.block_settings import BlockSettings
from mpillm.models.layers.attention import Attention
from mpillm.models.layers.cached_attention import LayerCache
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.models.layers.dropout import (
    ATTENTION_OUTPUT,
    FEED_FORWARD_OUTPUT,
    MaskKeys,
    drop,
)
from mpillm.models.layers.feed_forward import FeedForward
from mpillm.models.layers.mixture import Mixture
from mpillm.models.layers.norm import make_norm
from mpillm.models.layers.paged.paged_attention import PagedLayer
from mpillm.models.layers.recompute import recomputed
from mpillm.models.layers.rotary import Rotation

BlockOutput = Tensor | tuple[Tensor, Tensor]
"""The stream and, of a mixture that has one, the loss of its choices."""


class Balances:
    """The losses of the mixtures of a part, from block to block."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []

    def stream_of(self, made: BlockOutput) -> Tensor:
        """Return the stream of a block's output; keep its loss."""
        if isinstance(made, Tensor):
            return made
        self._found.append(made[1])
        return made[0]

    def total(self, config: BlockSettings) -> Tensor | None:
        """Return what training adds to the loss; None where no block has a loss."""
        return torch.stack(self._found).sum() * config.balance_loss if self._found else None


class BlockLayers(nn.Module):
    """What the blocks of all stacks have: self-attention and feed-forward, joined to the stream."""

    def __init__(self, config: BlockSettings, block: int = 0, causal: bool = True) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.recomputes_attention = False
        self.first_position = 0
        """Of the stream in its sequences, where it is a part of them: dropout depends on it."""
        self.post_norm = config.norm_place == "post"
        sandwich = config.norm_place == "sandwich"
        self.attention_norm = make_norm(config) if config.norms_input(block) else nn.Identity()
        self.attention = Attention(config, block, causal)
        self.attention_output_norm = make_norm(config) if sandwich else None
        self.forward_norm = make_norm(config)
        self.feed_forward = Mixture(config) if config.experts else FeedForward(config)
        self.forward_output_norm = make_norm(config) if sandwich else None

    def add_attention(self, *given: Any) -> Tensor:
        """Add the self-attention to the stream. `given`: see `Block.forward`."""
        x_BTC, keys_B = given[0], given[5]
        recomputes = self.recomputes_attention
        a_BTC = recomputed(self._attend, *given) if recomputes else self._attend(*given)
        return self._joined(x_BTC, a_BTC, self.attention_norm, keys_B, ATTENTION_OUTPUT)

    def add_feed_forward(self, x_BTC: Tensor, keys_B: MaskKeys | None) -> BlockOutput:
        """Add the feed-forward to the stream; return the loss of a mixture's choices, too."""
        y_BTC = self.feed_forward(x_BTC if self.post_norm else self.forward_norm(x_BTC))
        balance = None
        if isinstance(self.feed_forward, Mixture):
            y_BTC, balance = y_BTC
        if self.forward_output_norm is not None:
            y_BTC = self.forward_output_norm(y_BTC)
        x_BTC = self._joined(x_BTC, y_BTC, self.forward_norm, keys_B, FEED_FORWARD_OUTPUT)
        return x_BTC if balance is None else (x_BTC, balance)

    def _attend(self, x_BTC: Tensor, *others: Any) -> Tensor:
        a_BTC: Tensor = self.attention(
            x_BTC if self.post_norm else self.attention_norm(x_BTC), *others
        )
        if self.attention_output_norm is not None:
            a_BTC = self.attention_output_norm(a_BTC)
        return a_BTC

    def _joined(
        self, x_BTC: Tensor, y_BTC: Tensor, norm: nn.Module, keys_B: MaskKeys | None, place: int
    ) -> Tensor:
        first = self.first_position * y_BTC.shape[-1]
        x_BTC = x_BTC + drop(y_BTC, self.dropout, keys_B, place, first)
        return norm(x_BTC) if self.post_norm else x_BTC


class Block(BlockLayers):
    """Block number `block`: attention and feed-forward, each with a residual connection."""

    def forward(
        self,
        x_BTC: Tensor,
        rotation: Rotation | None,
        spans: DocumentSpans | None,
        cache: LayerCache | PagedLayer | None,
        first: int,
        keys_B: MaskKeys | None = None,
        bias: Tensor | None = None,
    ) -> BlockOutput:
        """Compute the block. `keys_B`: the layer's keys of dropout masks; None: no dropout. The
        rest: see `attend` (attention.py).
        """
        x_BTC = self.add_attention(x_BTC, rotation, spans, cache, first, keys_B, bias)
        return self.add_feed_forward(x_BTC, keys_B)
