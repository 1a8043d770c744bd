"""A Transformer block: norms, attention and feed-forward, joined by residual connections.

Shapes: B sequences, T positions, C width.
"""

from typing import Any

from torch import Tensor, nn

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.attention import Attention
from mpillm.models.layers.cached_attention import LayerCache
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.models.layers.dropout import ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, drop
from mpillm.models.layers.feed_forward import FeedForward
from mpillm.models.layers.mixture import Mixture
from mpillm.models.layers.norm import make_norm
from mpillm.models.layers.recompute import recomputed
from mpillm.models.layers.rotary import Rotation


class Block(nn.Module):
    """Block number `block`: attention and feed-forward, each with a residual connection."""

    def __init__(self, config: DecoderConfig, block: int = 0) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.recomputes_attention = False
        sandwich = config.norm_place == "sandwich"
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, block)
        self.attention_output_norm = make_norm(config) if sandwich else None
        self.forward_norm = make_norm(config)
        self.feed_forward = Mixture(config) if config.experts else FeedForward(config)
        self.forward_output_norm = make_norm(config) if sandwich else None

    def forward(
        self,
        x_BTC: Tensor,
        rotation: Rotation | None,
        spans: DocumentSpans | None,
        cache: LayerCache | None,
        first: int,
        keys_B: Tensor | None = None,
    ) -> Tensor:
        """Compute the block. `keys_B`: the layer's keys of dropout masks; None: no dropout."""
        given = x_BTC, rotation, spans, cache, first, keys_B
        recomputes = self.recomputes_attention
        a_BTC = recomputed(self._attend, *given) if recomputes else self._attend(*given)
        x_BTC = x_BTC + drop(a_BTC, self.dropout, keys_B, ATTENTION_OUTPUT)
        y_BTC = self.feed_forward(self.forward_norm(x_BTC))
        if self.forward_output_norm is not None:
            y_BTC = self.forward_output_norm(y_BTC)
        return x_BTC + drop(y_BTC, self.dropout, keys_B, FEED_FORWARD_OUTPUT)

    def _attend(self, x_BTC: Tensor, *others: Any) -> Tensor:
        a_BTC: Tensor = self.attention(self.attention_norm(x_BTC), *others)
        if self.attention_output_norm is not None:
            a_BTC = self.attention_output_norm(a_BTC)
        return a_BTC
