"""The costs of an encoder-decoder: parameters, FLOPs and bytes, counted from the settings."""

from dataclasses import dataclass

from mpillm.models.block_costs import BlockCosts
from mpillm.models.encoder_decoder_settings import EncoderDecoderSettings
from mpillm.models.spec import LayerRecompute, Part, Recompute, recompute_of


@dataclass(frozen=True)
class EncoderDecoderCosts(EncoderDecoderSettings, BlockCosts):
    """What an encoder-decoder of these settings costs.

    FLOPs of "one token" are those of a token of the decoder, with its share of the source.
    """

    def parameters_of(self, part: Part) -> int:
        encoder, decoder = self.encoder_part(part), self.decoder_part(part)
        total = self._block_parameters(encoder) + self._block_parameters(decoder)
        total += decoder.count * (self._cross_products + self._cross_vectors)
        if self.positions == "relative":
            stacks = bool(encoder.count) + bool(decoder.count)
            total += stacks * self.relative_buckets * self.heads
        if self.norm_place == "pre":
            ends = self._ends_encoder(part) + self.ends(part)
            total += ends * self._norm_parameters(self.width)
        if self.begins(part) and self.mels:
            # Two convolutions over three frames, with biases.
            total += (3 * (self.mels + self.width) + 2) * self.width
        if self.begins_decoder(part) and self.decoder_positions == "learned":
            total += self.context * self.width
        total += self.vocab_size if self.ends(part) and self.head_bias else 0
        return total + self._tables(part) * self.vocab_size * self.width

    def _parameters_of_block(self, block: int) -> int:
        decodes = block >= self.layers
        cross = self._cross_products + self._cross_vectors if decodes else 0
        # The decoder's numbers begin again at 0, as do the norms that blocks leave out.
        part = self.decoder_part(Part(block, block + 1)) if decodes else Part(block, block + 1)
        return self._block_parameters(part) + cross

    def _tables(self, part: Part) -> int:
        """Count the matrices of the vocabulary in `part`, tied ones once."""
        embeds = (self.begins(part) and not self.mels) or self.begins_decoder(part)
        return embeds + (self.ends(part) and not (self.tied and embeds))

    def _ends_encoder(self, part: Part) -> bool:
        return part.first < self.layers <= part.last

    @property
    def _cross_products(self) -> int:
        """Count the weights of one block's cross-attention: half are of the source's positions."""
        return 2 * self.width * (self.query_width + self.key_value_width)

    @property
    def _cross_vectors(self) -> int:
        return self._norm_parameters(self.width) + self._attention_vectors

    @property
    def block_flops(self) -> tuple[float, ...]:
        """See BlockCosts; a cross-attention reads each position of the source."""
        share = self.source_context / self.context
        products, attended = 6 * self._block_products(self._active), 12 * self.query_width
        encoder = share * (products + attended * self.source_context)
        queries, keys = 2 * self.query_width, 2 * self.key_value_width
        cross = 6 * self.width * (queries + share * keys) + attended * self.source_context
        decoder = products + attended * self.context + cross
        return (encoder,) * self.layers + (decoder,) * self.decoder_blocks

    @property
    def end_flops(self) -> tuple[float, float]:
        """See DecoderCosts; the convolutions of sound are counted."""
        share = self.source_context / self.context
        # The first one computes every frame, of which a position has two.
        sound = 6 * 3 * self.width * (2 * self.mels + self.width) if self.mels else 0
        return share * sound, 6 * self.vocab_size * self.width

    @property
    def _of_source(self) -> "EncoderDecoderCosts":
        """These settings with the source's length: the costs of an encoder's position."""
        return self.replace(context=self.source_context)

    @property
    def _is_unfused(self) -> bool:
        # No fused kernel has a gradient for the bias of relative positions.
        return super()._is_unfused or self.positions == "relative"

    def _cross_saved(self, element_bytes: int) -> float:
        """Count a cross-attention's tensors for one token of the decoder: see _attention_saved."""
        share = self.source_context / self.context
        key_value = share * self.key_value_width
        norms = self.heads + share * self.key_value_heads
        saved: float = self._norm_saved(element_bytes)
        if self.query_key_norm:
            saved += norms * self._norm_saved(element_bytes, self.head_features)
        features = self.width + 2 * self.query_width + 2 * key_value
        if self.attention_dropout or self.attention_soft_cap:
            saved += self.heads * self.source_context * self._probability_saved(element_bytes)
        else:
            saved += 4 * self.heads
        return element_bytes * features + saved + (self.width if self.dropout else 0)

    def _decoder_saved(self, element_bytes: int, recompute: LayerRecompute) -> tuple[float, float]:
        """Return the bytes of one token and decoder block that are kept, and computed again."""
        kept, again = self._block_saved(element_bytes, recompute)
        cross = self._cross_saved(element_bytes)
        if recompute == "full":
            return kept, again + cross
        if recompute == "attention":
            # Its input, and what follows it. The two attentions run again one after the other.
            norm = self._norm_saved(element_bytes) if self.norm_place == "post" else 0
            mask = self.width if self.dropout else 0
            return kept + element_bytes * self.width + norm + mask, again
        return kept + cross, 0

    def recompute_bytes(
        self, part: Part, rows: int, element_bytes: int, recompute: Recompute
    ) -> tuple[int, int]:
        source, target = rows * self.source_context, rows * self.context
        of_source, highest = self._of_source, 0.0
        kept = self._ends_saved(part, rows, element_bytes)
        for block in range(part.first, part.last):
            kind = recompute_of(recompute, block)
            if block < self.layers:
                own, again = (source * x for x in of_source._block_saved(element_bytes, kind))
            else:
                own, again = (target * x for x in self._decoder_saved(element_bytes, kind))
            kept += own
            # When the backward pass comes to a block, it has freed those after it.
            highest = max(highest, kept + again)
        return int(kept), int(max(0.0, highest - kept))

    def _ends_saved(self, part: Part, rows: int, element_bytes: int) -> float:
        """Count the memory, which all decoder blocks read, the embeddings and the final norms."""
        source, target = rows * self.source_context, rows * self.context
        stream = element_bytes * self.width
        norm = self._norm_saved(element_bytes) if self.norm_place == "pre" else 0
        dropped = self.width if self.embedding_dropout else 0
        # The embedding's outputs, where the first block reads others.
        sums = self.positions == "sinusoidal" or self.embedding_dropout > 0
        dropped += stream if sums or self.scaled_embedding else 0
        kept = source * stream if self.decoder_part(part).count else 0.0
        if self.begins(part):
            kept += source * dropped
            if self.mels:
                # Of each convolution its input, its result and GELU's.
                kept += element_bytes * source * (2 * self.mels + 2 * 2 * self.width + self.width)
        if self._ends_encoder(part):
            kept += source * norm
        if self.begins_decoder(part):
            kept += target * dropped
        return kept + (target * norm if self.ends(part) else 0)

    def working_bytes(self, rows: int, element_bytes: int = 4) -> int:
        # The memory's gradient is summed over the decoder's blocks.
        memory = element_bytes * rows * self.source_context * self.width
        decoder = memory + super().working_bytes(rows, element_bytes)
        return max(decoder, self._of_source._encoder_working(rows, element_bytes))

    def _encoder_working(self, rows: int, element_bytes: int) -> int:
        return super().working_bytes(rows, element_bytes)

    def scoring_bytes(self, rows: int, element_bytes: int = 4) -> int:
        memory = element_bytes * rows * self.source_context * self.width
        decoder = memory + super().scoring_bytes(rows, element_bytes) + self._bias_bytes(0)
        return max(decoder, self._of_source._encoder_scoring(rows, element_bytes))

    def _encoder_scoring(self, rows: int, element_bytes: int) -> int:
        return super().scoring_bytes(rows, element_bytes) + self._bias_bytes(rows)

    def _bias_bytes(self, padded: int) -> int:
        """Count the bias of relative positions: once, and with the padding of each of its rows."""
        pairs = self.heads * self.context**2 if self.positions == "relative" else 0
        return 4 * pairs * (1 + padded)
