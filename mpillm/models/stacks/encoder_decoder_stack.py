"""The encoder-decoder on one device: from a source and token ids to a head of logits; or a part.

Shapes: B sequences, T positions, S positions of the source, C width, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mpillm.errors import RecipeError
from mpillm.models.encoder_decoder import EncoderDecoderConfig
from mpillm.models.layers.block import Balances, Block
from mpillm.models.layers.cached_attention import LayeredCache
from mpillm.models.layers.cross_block import CrossBlock, CrossCache
from mpillm.models.layers.dropout import EMBEDDING, EMBEDDING_LAYER, drop
from mpillm.models.layers.norm import make_norm
from mpillm.models.layers.sinusoidal import sinusoidal_positions
from mpillm.models.layers.sound_embedding import SoundEmbedding
from mpillm.models.linear_head import LinearHead, plain_outputs
from mpillm.models.part_module import Fields, GenerationCache, PartOutput, Streams
from mpillm.models.spec import Part
from mpillm.models.stacks.layer_stack import Transformer


class SourceCache(LayeredCache):
    """The encoder's outputs of B sources, and keys and values of all layers of the decoder."""

    def __init__(
        self, config: EncoderDecoderConfig, memory_BSC: Tensor, bias: Tensor | None
    ) -> None:
        self.memory_BSC, self.bias = memory_BSC, bias
        made = len(memory_BSC), memory_BSC.device, memory_BSC.dtype
        super().__init__([CrossCache(config, *made) for _ in range(config.decoder_blocks)])

    def select(self, rows_N: Tensor) -> None:
        super().select(rows_N)
        self.memory_BSC = self.memory_BSC[rows_N]
        self.bias = None if self.bias is None else self.bias[rows_N]


class EncoderDecoder(Transformer):
    """An encoder and a decoder that attends to its outputs, or a part of their blocks."""

    config: EncoderDecoderConfig
    table_SC: Tensor | None
    table_TC: Tensor | None

    def __init__(self, config: EncoderDecoderConfig, part: Part | None = None) -> None:
        super().__init__(config, part)
        self.config = config
        width, vocabulary = config.width, config.vocab_size
        encoder, decoder = config.encoder_part(self.part), config.decoder_part(self.part)
        text, sound = self.begins and not config.mels, self.begins and config.mels > 0
        self.source_embedding = nn.Embedding(vocabulary, width) if text else None
        self.sound = SoundEmbedding(config.mels, width) if sound else None
        sinusoidal = config.positions == "sinusoidal"
        self._add_table("table_SC", config.source_context, self.begins and sinusoidal)
        self.encoder = nn.ModuleDict(
            {str(n): Block(config, n, False) for n in range(encoder.first, encoder.last)}
        )
        pre = config.norm_place == "pre"
        ends_encoder = self.part.first < config.layers <= self.part.last
        self.encoder_norm = make_norm(config) if ends_encoder and pre else None
        begins, learned = config.begins_decoder(self.part), config.decoder_positions == "learned"
        self.embedding = nn.Embedding(vocabulary, width) if begins else None
        self.position = nn.Embedding(config.context, width) if begins and learned else None
        self._add_table("table_TC", config.context, begins and sinusoidal and not learned)
        self.decoder = nn.ModuleDict(
            {str(n): CrossBlock(config, n) for n in range(decoder.first, decoder.last)}
        )
        self.norm = make_norm(config) if self.ends and pre else None
        self.head = nn.Linear(width, vocabulary, bias=config.head_bias) if self.ends else None
        self.tie()

    def _add_table(self, name: str, length: int, held: bool) -> None:
        config = self.config
        given = length, config.width, config.sinusoid_ends
        table = sinusoidal_positions(*given) if held else None
        self.register_buffer(name, table, persistent=False)

    def numbered_blocks(self) -> Iterator[tuple[int, nn.Module]]:
        for first, blocks in ((0, self.encoder), (self.config.layers, self.decoder)):
            yield from ((first + int(number), block) for number, block in blocks.items())

    def additions(self, name: str) -> int:
        # A decoder's block adds three times.
        decodes = name.startswith("decoder.")
        return 3 * self.config.decoder_blocks if decodes else super().additions(name)

    def forward_part(self, fields: Fields, streams: Streams) -> PartOutput:
        """Compute the part. Fields: `source` (B, S) or `frames` (B, F, mels) at the beginning,
        `ids` (B, T) where the decoder begins. Optional: `source_lengths` (B,), best in host memory,
        and `dropout_keys` (B,).
        """
        pivots = [*streams]
        memory_BSC = streams[0] if streams else self._embed_source(fields, pivots)
        bias, balances = self._source_bias(fields, memory_BSC), Balances()
        memory_BSC = self._encode(fields, memory_BSC, bias, balances)
        if not self.decoder:
            return PartOutput((memory_BSC,), tuple(pivots), balances.total(self.config))
        x_BTC = streams[1] if len(streams) > 1 else self._embed(fields, pivots)
        x_BTC, memory_BSC = self._decode(fields, x_BTC, memory_BSC, bias, balances)
        outputs = (memory_BSC, x_BTC) if self.head is None else (self._head_of(x_BTC),)
        return PartOutput(outputs, tuple(pivots), balances.total(self.config))

    def _embed_source(self, fields: Fields, pivots: list[Tensor]) -> Tensor:
        if self.config.source_field not in fields:
            raise RecipeError(
                f"model.architecture = {self.config.architecture!r} reads the field "
                f"{self.config.source_field!r}, and a batch has {', '.join(sorted(fields))}; "
                "set task.name to a task whose batches have it"
            )
        if self.sound is not None:
            x_BSC = self.sound(fields["frames"])
        else:
            assert self.source_embedding is not None
            x_BSC = self.source_embedding(fields["source"])
        pivots.append(x_BSC)
        if x_BSC.shape[1] > self.config.source_context:
            raise ValueError(
                f"{x_BSC.shape[1]} positions exceed the source_context of "
                f"{self.config.source_context}"
            )
        return self._with_positions(fields, x_BSC, self.table_SC, self.sound is None, 0)

    def _embed(self, fields: Fields, pivots: list[Tensor], first: int = 0) -> Tensor:
        """Embed `ids`, the positions from `first` on."""
        assert self.embedding is not None
        x_BTC = self.embedding(fields["ids"])
        pivots.append(x_BTC)
        last = first + x_BTC.shape[1]
        if last > self.config.context:
            raise ValueError(f"{last} positions exceed the context of {self.config.context}")
        table_TC = self.table_TC if self.position is None else self.position.weight
        table_TC = None if table_TC is None else table_TC[first:]
        return self._with_positions(fields, x_BTC, table_TC, True, 1)

    def _with_positions(
        self, fields: Fields, x_BTC: Tensor, table_TC: Tensor | None, scaled: bool, stack: int
    ) -> Tensor:
        """Scale an embedding, add the positions of `table_TC`, and drop, by keys of the stack."""
        if scaled and self.config.scaled_embedding:
            x_BTC = x_BTC * self.config.width**0.5
        if table_TC is not None:
            x_BTC = x_BTC + table_TC[: x_BTC.shape[1]].to(x_BTC.dtype)
        keys_B = self._keys(fields, EMBEDDING_LAYER + stack)
        return drop(x_BTC, self.config.embedding_dropout, keys_B, EMBEDDING)

    def _source_bias(self, fields: Fields, memory_BSC: Tensor) -> Tensor | None:
        """Make the bias (B, 1, 1, S) that masks the padding of sources; None without padding."""
        lengths_B, length = fields.get("source_lengths"), memory_BSC.shape[1]
        if lengths_B is None or int(lengths_B.min()) >= length:
            return None
        # An empty source has its first position, of padding: a softmax needs one.
        lengths_B = lengths_B.clamp(min=1)
        padding_BS = torch.arange(length, device=lengths_B.device) >= lengths_B[:, None]
        bias_BS = torch.zeros(padding_BS.shape, device=lengths_B.device)
        bias_BS = bias_BS.masked_fill_(padding_BS, -torch.inf)
        return bias_BS.to(memory_BSC.device, memory_BSC.dtype)[:, None, None]

    def _encode(
        self, fields: Fields, x_BSC: Tensor, bias: Tensor | None, balances: Balances
    ) -> Tensor:
        for number, block in self.encoder.items():
            given = x_BSC, None, None, None, 0, self._keys(fields, int(number)), bias
            x_BSC = self._run(block, int(number), balances, *given)
        return x_BSC if self.encoder_norm is None else self.encoder_norm(x_BSC)

    def _decode(
        self,
        fields: Fields,
        x_BTC: Tensor,
        memory_BSC: Tensor,
        bias: Tensor | None,
        balances: Balances,
        cache: SourceCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the decoder's blocks; return the stream, and the memory for the next part."""
        first = cache.length if cache else 0
        for number, block in self.decoder.items():
            layer = self.config.layers + int(number)
            layer_cache = cache.layers[int(number)] if cache else None
            # A view for the next block: gradients of the memory are then summed block by block, in
            # one order, wherever a stage ends.
            own_BSC, memory_BSC = memory_BSC, memory_BSC.view_as(memory_BSC)
            given = x_BTC, own_BSC, layer_cache, first, self._keys(fields, layer), bias
            x_BTC = self._run(block, layer, balances, *given)
        return x_BTC, memory_BSC

    def _head_of(self, x_BTC: Tensor) -> LinearHead:
        assert self.head is not None
        x_BTC = x_BTC if self.norm is None else self.norm(x_BTC)
        if self.config.scaled_head:
            x_BTC = x_BTC * self.config.width**-0.5
        return LinearHead.of(x_BTC, self.head)

    def encode_source(self, fields: Fields) -> SourceCache:
        memory_BSC = self._embed_source(fields, [])
        bias = self._source_bias(fields, memory_BSC)
        return SourceCache(self.config, self._encode(fields, memory_BSC, bias, Balances()), bias)

    def next_logits(self, ids_BT: Tensor, cache: GenerationCache) -> Tensor:
        assert isinstance(cache, SourceCache)
        assert cache.lengths_B is None, "rows begin with a start token, so they are equally long"
        x_BTC = self._embed({"ids": ids_BT}, [], cache.length)
        x_BTC, _ = self._decode({}, x_BTC, cache.memory_BSC, cache.bias, Balances(), cache)
        cache.grow(ids_BT.shape[1])
        return self._head_of(x_BTC).logits()

    def forward(self, fields: Fields) -> Tensor:
        """Return the logits (B, T, V) of the whole model; fields: see `forward_part`."""
        return plain_outputs(self.forward_part(fields, ()).outputs)[0]
