"""The decoder on one device: from token ids to a head of logits; or a part of its blocks.

Shapes: B sequences, T positions, C width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.block import Balances, Block
from mpillm.models.layers.cached_attention import LayerCache
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.models.layers.dropout import EMBEDDING, EMBEDDING_LAYER, drop, layer_keys
from mpillm.models.layers.norm import make_norm
from mpillm.models.layers.recompute import recomputed
from mpillm.models.layers.rotary import Rotary, Rotation
from mpillm.models.linear_head import LinearHead, plain_outputs
from mpillm.models.part_module import (
    Fields,
    GenerationCache,
    PartModule,
    PartOutput,
    Streams,
)
from mpillm.models.spec import Part, Recompute, recompute_of

# Outputs that are added to the stream. Their initial deviation is smaller by √(2 · layers), so that
# the variance of the stream does not grow with depth (GPT-2, Radford et al. 2019, section 2.3).
RESIDUAL_OUTPUTS = (".attention.output.weight", ".down.weight")


class Cache(GenerationCache):
    """Keys and values of all layers, and how many positions they hold."""

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layers = [LayerCache(config, batch, device, dtype) for _ in range(config.layers)]
        self.length = 0


class Decoder(PartModule):
    """A pre-norm Transformer decoder, or a part of it."""

    def __init__(self, config: DecoderConfig, part: Part | None = None) -> None:
        super().__init__(config, part)
        self.config = config
        learned = self.begins and config.positions == "learned"
        self.embedding = nn.Embedding(config.vocab_size, config.width) if self.begins else None
        self.position = nn.Embedding(config.context, config.width) if learned else None
        rotary = config.positions == "rotary"
        self.rotary = Rotary(config) if rotary else None
        windowed = rotary and config.window_rope_theta > 0
        self.window_rotary = Rotary(config, windowed=True) if windowed else None
        numbers = range(self.part.first, self.part.last)
        self.layers = nn.ModuleDict({str(number): Block(config, number) for number in numbers})
        self.norm = make_norm(config) if self.ends else None
        self.head = nn.Linear(config.width, config.vocab_size, bias=False) if self.ends else None
        self.tie()

    def deviation_of(self, name: str) -> float:
        deviation = self.initial_deviation
        if name.endswith(RESIDUAL_OUTPUTS):
            deviation /= (2 * self.config.layers) ** 0.5
        return deviation

    def fill_of(self, name: str) -> float:
        return 0.0 if self.config.norm == "rmsnorm1p" else 1.0

    def set_recompute(self, recompute: Recompute) -> None:
        self.recompute = recompute
        for number, block in self.layers.items():
            assert isinstance(block, Block)
            block.recomputes_attention = recompute_of(recompute, int(number)) == "attention"

    def forward_part(
        self, fields: Fields, streams: Streams, cache: Cache | None = None
    ) -> PartOutput:
        """Compute the part. Fields: `ids` (B, T) at the beginning; `documents` (B, T) and
        `dropout_keys` (B,), optional; `documents` best in host memory.
        """
        pivot_BTC = streams[0] if self.embedding is None else self.embedding(fields["ids"])
        x_BTC, document_BT = pivot_BTC, fields.get("documents")
        first = cache.length if cache else 0
        length = x_BTC.shape[1]
        if first + length > self.config.context:
            raise ValueError(
                f"{first + length} positions exceed the context of {self.config.context}"
            )
        if self.embedding is not None and self.config.scaled_embedding:
            x_BTC = x_BTC * self.config.width**0.5
        if self.position is not None:
            x_BTC = x_BTC + self.position.weight[first : first + length]
        row_keys_B = fields.get("dropout_keys")
        if row_keys_B is not None and self.embedding is not None:
            embedding_keys_B = layer_keys(row_keys_B, EMBEDDING_LAYER)
            x_BTC = drop(x_BTC, self.config.embedding_dropout, embedding_keys_B, EMBEDDING)
        spans = None if document_BT is None else DocumentSpans(document_BT, x_BTC.device)
        rotations, balances = self._rotations(first, x_BTC), Balances()
        for number, block in self.layers.items():
            layer_cache = cache.layers[int(number)] if cache else None
            keys_B = None if row_keys_B is None else layer_keys(row_keys_B, int(number))
            rotation = rotations[self.config.slides(int(number))]
            given = x_BTC, rotation, spans, layer_cache, first, keys_B
            whole = recompute_of(self.recompute, int(number)) == "full"
            x_BTC = balances.stream_of(recomputed(block, *given) if whole else block(*given))
        # Layers share the length: it grows once, after the last of them.
        if cache and self.ends:
            cache.length += length
        if self.norm is not None and self.head is not None:
            head = LinearHead.of(self.norm(x_BTC), self.head, self.config.logits_soft_cap)
            return PartOutput((head,), (pivot_BTC,), balances.total(self.config))
        return PartOutput((x_BTC,), (pivot_BTC,), balances.total(self.config))

    def _rotations(self, first: int, x_BTC: Tensor) -> tuple[Rotation | None, Rotation | None]:
        """Return the rotations of the stream's positions: of layers without, and with, a window."""
        if self.rotary is None:
            return None, None
        given = first, x_BTC.shape[1], x_BTC.dtype
        rotation: Rotation = self.rotary(*given)
        return rotation, rotation if self.window_rotary is None else self.window_rotary(*given)

    def compiled_layers(self) -> list[nn.Module]:
        # Each batch sends another number of positions to an expert: another shape to compile.
        return [] if self.config.experts else list(self.layers.values())

    def layer_arguments(self, rows: int) -> tuple[Any, ...]:
        weight = next(self.layers.parameters())
        shape = (rows, self.config.context, self.config.width)
        x_BTC = torch.zeros(shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
        keys_B = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        keys = keys_B if self.config.drops else None
        rotation = self._rotations(0, x_BTC)[self.config.slides(self.part.first)]
        return x_BTC, rotation, None, None, 0, keys

    def make_cache(self, batch: int) -> Cache:
        return Cache(self.config, batch, next(self.parameters()).device)

    def next_logits(self, ids_BT: Tensor, cache: GenerationCache) -> Tensor:
        assert isinstance(cache, Cache)
        logits_BTV: Tensor = self(ids_BT, cache=cache)
        return logits_BTV

    def forward(
        self, given: Tensor, document_BT: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return the logits (B, T, V) of the token after each position of the ids `given` (B, T).

        A part that does not begin the model takes the stream (B, T, C) of the part before. A part
        that does not end the model returns the stream. `document_BT` numbers the document of each
        position: with it, a position attends only to its own document, whose positions follow each
        other. With a `cache` the T positions are those after what it holds, and it grows by T.
        Raises ValueError when the positions exceed the context.
        """
        fields = {"ids": given}
        if document_BT is not None:
            fields["documents"] = document_BT
        return plain_outputs(self.forward_part(fields, (given,), cache).outputs)[0]
