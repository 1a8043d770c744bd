"""The decoder on one device: from token ids to a head of logits; or a part of its blocks.

Shapes: B sequences, T positions, C width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.block import Balances
from mpillm.models.layers.cached_attention import LayerCache, LayeredCache
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.models.layers.dropout import EMBEDDING, EMBEDDING_LAYER, drop
from mpillm.models.layers.norm import make_norm
from mpillm.models.layers.paged.paged_attention import PagedCache
from mpillm.models.linear_head import LinearHead, plain_outputs
from mpillm.models.part_module import (
    Fields,
    GenerationCache,
    PartOutput,
    Streams,
    last_of,
)
from mpillm.models.spec import Part
from mpillm.models.stacks.layer_stack import LayerStack


class Cache(LayeredCache):
    """Keys and values of all layers, and how many positions they hold."""

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__([LayerCache(config, batch, device, dtype) for _ in range(config.layers)])


class Decoder(LayerStack):
    """A pre-norm Transformer decoder, or a part of it."""

    config: DecoderConfig

    def __init__(self, config: DecoderConfig, part: Part | None = None) -> None:
        super().__init__(config, part)
        self.config = config
        learned = self.begins and config.positions == "learned"
        self.embedding = nn.Embedding(config.vocab_size, config.width) if self.begins else None
        self.position = nn.Embedding(config.context, config.width) if learned else None
        self._add_layers(causal=True)
        self.norm = make_norm(config) if self.ends else None
        self.head = nn.Linear(config.width, config.vocab_size, bias=False) if self.ends else None
        self.tie()

    def forward_part(
        self, fields: Fields, streams: Streams, cache: "Cache | PagedCache | None" = None
    ) -> PartOutput:
        """Compute the part. Fields: `ids` (B, T) at the beginning; `documents` (B, T) and
        `dropout_keys` (B,), optional; `documents` best in host memory. `positions` (T,), optional:
        the places of the T positions in the row, whose other positions another process computes;
        `documents` is then of the whole row.
        """
        pivot_BTC = streams[0] if self.embedding is None else self.embedding(fields["ids"])
        x_BTC, document_BT = pivot_BTC, fields.get("documents")
        positions_T = fields.get("positions")
        first = cache.length if cache else 0
        length = x_BTC.shape[1]
        if cache is not None and cache.lengths_B is not None:
            positions_T = cache.places(length)
        if first + length > self.config.context:
            raise ValueError(
                f"{first + length} positions exceed the context of {self.config.context}"
            )
        if self.embedding is not None and self.config.scaled_embedding:
            x_BTC = x_BTC * self.config.width**0.5
        spans = None if document_BT is None else DocumentSpans(document_BT, x_BTC.device)
        if self.position is not None:
            own = slice(first, first + length) if positions_T is None else positions_T
            # A document has the positions that it has alone; rotary ones are relative.
            places = own if spans is None else spans.places[:, own]
            x_BTC = x_BTC + self.position.weight[places]
        if self.embedding is not None:
            keys_B = self._keys(fields, EMBEDDING_LAYER)
            x_BTC = drop(x_BTC, self.config.embedding_dropout, keys_B, EMBEDDING)
        rotations, balances = self._rotations(first, x_BTC, positions_T), Balances()
        for number, block in self.numbered_blocks():
            layer_cache = cache.layers[number] if cache else None
            rotation = rotations[self.config.slides(number)]
            given = x_BTC, rotation, spans, layer_cache, first, self._keys(fields, number)
            x_BTC = self._run(block, number, balances, *given)
        # Layers share the length: it grows once, after the last of them.
        if cache and self.ends:
            cache.grow(length)
        if self.norm is not None and self.head is not None:
            head = LinearHead.of(self.norm(x_BTC), self.head, self.config.logits_soft_cap)
            return PartOutput((head,), (pivot_BTC,), balances.total(self.config))
        return PartOutput((x_BTC,), (pivot_BTC,), balances.total(self.config))

    def make_cache(self, batch: int) -> Cache:
        # In the dtype of the weights: in training it may be a lower one.
        weight = next(self.parameters())
        return Cache(self.config, batch, weight.device, weight.dtype)

    def next_logits(self, ids_BT: Tensor, cache: GenerationCache) -> Tensor:
        assert isinstance(cache, Cache)
        logits_BTV: Tensor = self(ids_BT, cache=cache)
        return logits_BTV

    def last_logits(self, ids_BT: Tensor, lengths_B: Tensor, cache: GenerationCache) -> Tensor:
        assert isinstance(cache, Cache)
        [head] = self.forward_part({"ids": ids_BT}, (), cache).outputs
        assert isinstance(head, LinearHead)
        if int(lengths_B.min()) < ids_BT.shape[1]:
            cache.cut(lengths_B)
        # The logits of a batch's prompts would need gigabytes.
        hidden_BC = last_of(head.hidden_BTC, lengths_B)
        return head._replace(hidden_BTC=hidden_BC[:, None]).logits()[:, 0]

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
