"""The costs of a decoder: those of its blocks, of its embeddings and of its head."""

from dataclasses import dataclass

from mpillm.models.block_costs import BlockCosts
from mpillm.models.decoder_settings import DecoderSettings
from mpillm.models.spec import Part, Recompute


@dataclass(frozen=True)
class DecoderCosts(DecoderSettings, BlockCosts):
    """What a decoder of these settings costs."""

    def parameters_of(self, part: Part) -> int:
        embedding = self.vocab_size * self.width
        total = self._block_parameters(part)
        if self.begins(part):
            total += embedding + (self.context * self.width if self.positions == "learned" else 0)
        if self.ends(part):
            shared = self.tied and self.begins(part)
            total += self._norm_parameters(self.width) + (0 if shared else embedding)
        return total

    @property
    def end_flops(self) -> tuple[float, float]:
        """0 for the embedding, a gather; 6 for each weight of the head's product.

        The loss is not counted: the head's one large product runs faster per FLOP than a block's
        many small ones. Head and loss together take 0.9 to 1.0 of the time that this count predicts
        (benchmarks/bubble.py).
        """
        return 0.0, 6 * self.vocab_size * self.width

    def recompute_bytes(
        self, part: Part, rows: int, element_bytes: int, recompute: Recompute
    ) -> tuple[int, int]:
        tokens = rows * self.context
        kept, again = self._block_bytes(part, rows, element_bytes, recompute)
        separate = (
            self.positions == "learned" or self.scaled_embedding or self.embedding_dropout > 0
        )
        if self.begins(part) and separate:
            # The embedding's outputs, where the first block reads others.
            kept += element_bytes * self.width + (self.width if self.embedding_dropout else 0)
        if self.ends(part):
            kept += self._norm_saved(element_bytes)
        return int(tokens * kept), int(tokens * again)

    def output_bytes(self, rows: int, device: str = "cpu") -> int:
        nbytes = super().output_bytes(rows, device)
        # A soft cap keeps its slopes next to the logits of a chunk.
        return nbytes + (self.logits_bytes(rows, device) if self.logits_soft_cap else 0)
