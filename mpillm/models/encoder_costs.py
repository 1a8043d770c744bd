"""The costs of an encoder: those of its blocks, of its embeddings and of its head."""

from dataclasses import dataclass

from mpillm.models.block_costs import BlockCosts
from mpillm.models.encoder_settings import EncoderSettings
from mpillm.models.spec import Part, Recompute


@dataclass(frozen=True)
class EncoderCosts(EncoderSettings, BlockCosts):
    """What an encoder of these settings costs."""

    def parameters_of(self, part: Part) -> int:
        total = self._block_parameters(part)
        if self.begins(part):
            total += self._embedding_parameters
        if self.ends(part):
            shared = bool(self.tied_weights) and self.begins(part)
            total += self._head_parameters - (self.head_rows * self.width if shared else 0)
        return total

    @property
    def _embedding_parameters(self) -> int:
        rows = self.token_types + (self.vocab_size if self.reads_tokens else 0)
        total = self._embedding_products
        if self.positions == "learned":
            rows += self.position_offset + self.context
        if self.image_size:
            # The class token, and the bias of the patches' product.
            rows += 2
        if self.mels:
            rows += 2
        if self.embedding_norm:
            total += self._norm_parameters(self.width)
        return total + rows * self.width

    @property
    def _embedding_products(self) -> int:
        """Count the weights of the embedding's products: of patches, or of frames."""
        if self.image_size:
            return self.channels * self.patch_size**2 * self.width
        return 3 * self.width * (self.mels + self.width) if self.mels else 0

    @property
    def _head_products(self) -> int:
        layer = 0 if self.head_layer == "none" else self.width**2
        return layer + self.head_rows * self.width

    @property
    def _head_parameters(self) -> int:
        vectors = self.head_rows if self.head_bias else 0
        if self.ends_in_norm:
            vectors += self._norm_parameters(self.width)
        if self.head_layer != "none" and self.bias:
            vectors += self.width
        if self.head_layer == "norm":
            vectors += self._norm_parameters(self.width)
        return self._head_products + vectors

    @property
    def _head_positions(self) -> int:
        """The positions of a sequence that the head reads."""
        return 1 if self.head == "sequence" else self.context

    @property
    def end_flops(self) -> tuple[float, float]:
        """6 for each weight of the ends' products, a token; those of one position are shared among
        all. The first of sound's convolutions has two frames for a position.
        """
        first = 3 * self.width * self.mels
        share = self._head_positions / self.context
        return 6 * (self._embedding_products + first), 6 * self._head_products * share

    def recompute_bytes(
        self, part: Part, rows: int, element_bytes: int, recompute: Recompute
    ) -> tuple[int, int]:
        kept, again = self._block_bytes(part, rows, element_bytes, recompute)
        tokens, of_read = rows * self.context, 0
        if self.begins(part):
            kept += self._embedding_saved(element_bytes)
        if self.ends(part):
            of_all, of_read = self._head_saved(element_bytes)
            kept += of_all + (self._norm_saved(element_bytes) if self.ends_in_norm else 0)
        return int(tokens * kept + rows * self._head_positions * of_read), int(tokens * again)

    def _embedding_saved(self, element_bytes: int) -> int:
        """Count of a position what the embedding keeps: its inputs, its outputs where the first
        block reads others, and its norm's input.
        """
        stream = element_bytes * self.width
        others = self.token_types or self.positions in ("learned", "sinusoidal")
        kept = stream if others or self.embedding_dropout else 0
        if self.image_size:
            kept += element_bytes * self.channels * self.patch_size**2
        if self.mels:
            # Two frames with their first convolution and its GELU, and the second convolution.
            kept += element_bytes * (2 * self.mels + 4 * self.width + self.width)
        if self.embedding_norm:
            kept += self._norm_saved(element_bytes) if others else stream
        return kept + (self.width if self.embedding_dropout else 0)

    def _head_saved(self, element_bytes: int) -> tuple[int, int]:
        """Count what the head keeps of each position, and of each that it reads, pooled or not."""
        stream, pools = element_bytes * self.width, self.head in ("sequence", "none")
        if self.head_layer == "none" and self.head in ("lm", "none"):
            return 0, 0
        kept = {"none": 0, "tanh": stream, "norm": 2 * stream + 2 * 4}[self.head_layer]
        if self.head_layer == "norm" and self.head != "lm":
            # Read by the last product; that of `lm` is in the loss.
            kept += stream
        if self.head_dropout and self.head_rows:
            kept += stream + self.width
        return (0, kept + stream) if pools else (stream, kept)

    def output_bytes(self, rows: int, device: str = "cpu") -> int:
        """Count a loss in chunks of `lm`; of others the outputs, their gradients, and what a
        softmax keeps.
        """
        if self.head == "lm":
            return super().output_bytes(rows, device)
        # The softmax of all alignments has a gradient of its own.
        return (4 if self.head == "ctc" else 3) * self.logits_bytes(rows, device)

    def logits_bytes(self, rows: int, device: str = "cpu") -> int:
        if self.head == "lm":
            return super().logits_bytes(rows, device)
        return 4 * rows * self._head_positions * (self.head_rows or self.width)
