"""The block of a decoder that reads a source: self-attention, cross-attention and feed-forward.

Shapes: B sequences, T positions, S positions of the source, C width.
"""

import torch
from torch import Tensor

from mpillm.models.block_settings import BlockSettings
from mpillm.models.layers.attention import CrossAttention
from mpillm.models.layers.block import BlockLayers, BlockOutput
from mpillm.models.layers.cached_attention import LayerCache
from mpillm.models.layers.dropout import ATTENTION_OUTPUT, layer_keys
from mpillm.models.layers.norm import make_norm
from mpillm.models.layers.recompute import recomputed

# Dropout of the cross-attention: a layer below the block's.
CROSS_LAYER = 1


class CrossCache(LayerCache):
    """Keys and values of one layer: of the past positions, and of the source, computed once."""

    def __init__(
        self, config: BlockSettings, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(config, batch, device, dtype)
        self.source: tuple[Tensor, Tensor] | None = None

    def select(self, rows_N: Tensor) -> None:
        super().select(rows_N)
        if self.source is not None:
            self.source = self.source[0][rows_N], self.source[1][rows_N]


class CrossBlock(BlockLayers):
    """Causal self-attention, cross-attention and feed-forward, each with a residual connection."""

    def __init__(self, config: BlockSettings, block: int = 0) -> None:
        super().__init__(config, block)
        self.cross_norm = make_norm(config)
        self.cross_attention = CrossAttention(config)

    def forward(
        self,
        x_BTC: Tensor,
        memory_BSC: Tensor,
        cache: CrossCache | None,
        first: int,
        keys_B: Tensor | None = None,
        source_bias: Tensor | None = None,
    ) -> BlockOutput:
        """Compute the block from position `first` on.

        `memory_BSC`: the encoder's outputs. `keys_B`: the layer's keys of dropout masks; None: no
        dropout. `source_bias`: added to the scores of the source, (B, 1, 1, S).
        """
        x_BTC = self.add_attention(x_BTC, None, None, cache, first, keys_B, None)
        cross_keys_B = None if keys_B is None else layer_keys(keys_B, CROSS_LAYER)
        given = x_BTC, memory_BSC, cache, cross_keys_B, source_bias
        recomputes = self.recomputes_attention
        a_BTC = (
            recomputed(self._attend_source, *given) if recomputes else self._attend_source(*given)
        )
        x_BTC = self._joined(x_BTC, a_BTC, self.cross_norm, cross_keys_B, ATTENTION_OUTPUT)
        return self.add_feed_forward(x_BTC, keys_B)

    def _attend_source(
        self,
        x_BTC: Tensor,
        memory_BSC: Tensor,
        cache: CrossCache | None,
        keys_B: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        memory: Tensor | tuple[Tensor, Tensor] = memory_BSC
        if cache is not None:
            cache.source = cache.source or self.cross_attention.keys_values(memory_BSC)
            memory = cache.source
        normed_BTC = x_BTC if self.post_norm else self.cross_norm(x_BTC)
        a_BTC: Tensor = self.cross_attention(normed_BTC, memory, keys_B, bias)
        return a_BTC
