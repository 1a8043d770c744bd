"""The feed-forward layer of a block.

Shapes: B sequences, T positions, C width.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from mpillm.models.block_settings import BlockSettings


class FeedForward(nn.Module):
    """The feed-forward layer: GELU, ReLU or SiLU, or a gated unit (Shazeer 2020) of them."""

    def __init__(self, config: BlockSettings, hidden: int = 0) -> None:
        """Make it with a width inside of `hidden` (0: that of the settings)."""
        super().__init__()
        hidden = hidden or config.hidden_width
        # The tanh form is that of GPT-2's released weights.
        self.form = "none" if config.activation.endswith("exact") else "tanh"
        self.silu = config.activation in ("swiglu", "silu")
        self.relu = config.activation == "relu"
        sizes = config.width, hidden
        self.gate = nn.Linear(*sizes, bias=config.bias) if config.gated else None
        self.up = nn.Linear(*sizes, bias=config.bias)
        self.down = nn.Linear(hidden, config.width, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.gate is None:
            inside = self._activated(self.up(x_BTC))
        else:
            inside = self._activated(self.gate(x_BTC)) * self.up(x_BTC)
        y_BTC: Tensor = self.down(inside)
        return y_BTC

    def _activated(self, x: Tensor) -> Tensor:
        if self.relu:
            return F.relu(x)
        return F.silu(x) if self.silu else F.gelu(x, approximate=self.form)
