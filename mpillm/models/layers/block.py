"""A Transformer block: norms, feed-forward, and the block that joins them with attention.

Shapes: B sequences, T positions, C width.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.attention import Attention
from mpillm.models.layers.cached_attention import LayerCache
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.models.layers.dropout import ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, drop
from mpillm.models.layers.recompute import recomputed
from mpillm.models.layers.rms_norm import RMSNorm
from mpillm.models.layers.rotary import Rotation


def make_norm(config: DecoderConfig) -> nn.Module:
    """Make the norm that the settings name."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, eps=config.norm_epsilon)
    return nn.LayerNorm(config.width, eps=config.norm_epsilon)


class FeedForward(nn.Module):
    """The feed-forward layer: SwiGLU (Shazeer 2020) or GELU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = (
            nn.Linear(config.width, config.hidden_width, bias=config.bias)
            if config.activation == "swiglu"
            else None
        )
        self.up = nn.Linear(config.width, config.hidden_width, bias=config.bias)
        self.down = nn.Linear(config.hidden_width, config.width, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.gate is None:
            # The tanh form is that of GPT-2's released weights.
            inside = F.gelu(self.up(x_BTC), approximate="tanh")
        else:
            inside = F.silu(self.gate(x_BTC)) * self.up(x_BTC)
        y_BTC: Tensor = self.down(inside)
        return y_BTC


class Block(nn.Module):
    """A pre-norm Transformer block: attention and feed-forward, each with a residual connection."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.recomputes_attention = False
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)

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
        return x_BTC + drop(y_BTC, self.dropout, keys_B, FEED_FORWARD_OUTPUT)

    def _attend(self, x_BTC: Tensor, *others: Any) -> Tensor:
        a_BTC: Tensor = self.attention(self.attention_norm(x_BTC), *others)
        return a_BTC
