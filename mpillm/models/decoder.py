"""The decoder architecture: its settings, its costs and its named shapes; needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from mpillm.errors import RecipeError
from mpillm.models.head_chunks import chunk_bytes, head_bytes
from mpillm.models.spec import LayerRecompute, ModelSpec, Part, Recompute, recompute_counts

if TYPE_CHECKING:
    from mpillm.models.layers.decoder_stack import Decoder

Positive = Annotated[int, Gt(0)]


@dataclass(frozen=True)
class DecoderConfig(ModelSpec):
    """A pre-norm Transformer decoder. Lengths are in tokens, widths in features."""

    shared_inputs: ClassVar[tuple[str, ...]] = ("documents",)
    host_inputs: ClassVar[tuple[str, ...]] = ("documents",)
    recomputes: ClassVar[tuple[LayerRecompute, ...]] = ("attention", "full")

    architecture: str = "decoder"
    layers: Positive = 4
    width: Positive = 128
    heads: Positive = 4
    kv_heads: Annotated[int, Ge(0)] = 0
    """Heads of keys and values (grouped-query attention); 0: as many as `heads`."""
    hidden: Annotated[int, Ge(0)] = 0
    """Width inside the feed-forward.

    0: 4 × width for GELU; 8/3 × width for SwiGLU, rounded up to a multiple of 64.
    """
    context: Positive = 256
    vocab_size: Annotated[int, Ge(0)] = 0
    """0: taken from the data."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    positions: Literal["rotary", "learned"] = "rotary"
    activation: Literal["swiglu", "gelu"] = "swiglu"
    bias: bool = False
    tied: bool = True
    """The output head is the token embedding."""
    rope_theta: Annotated[float, Gt(0)] = 10000.0
    norm_epsilon: Annotated[float, Gt(0)] = 1e-5
    dropout: float = 0.0
    """Probability that training sets a value to 0 where attention or feed-forward adds to the
    stream.
    """
    attention_dropout: float = 0.0
    """The same for the attention's probabilities; they are then computed without a fused kernel."""
    embedding_dropout: float = 0.0
    """The same for the embedding's outputs."""

    def __post_init__(self) -> None:
        for name in ("dropout", "attention_dropout", "embedding_dropout"):
            if not 0 <= (probability := getattr(self, name)) < 1:
                raise RecipeError(
                    f"{name} = {probability:g} is the probability that a value is set to 0: "
                    "0 (none) or more, and less than 1, which would leave nothing; try 0.1"
                )
        if self.width % self.heads:
            raise RecipeError(
                f"width {self.width} is not divisible by {self.heads} heads; "
                f"use a width of {self.width // self.heads * self.heads or self.heads} "
                f"or {(self.width // self.heads + 1) * self.heads}, or another number of heads"
            )
        if self.heads % self.key_value_heads:
            raise RecipeError(
                f"{self.heads} heads are not divisible by {self.key_value_heads} kv_heads; "
                f"use a divisor of {self.heads}"
            )
        if self.positions == "rotary" and self.head_width % 2:
            raise RecipeError(
                f"rotary positions need an even width a head, "
                f"and {self.width} / {self.heads} is {self.head_width}"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def hidden_width(self) -> int:
        if self.hidden:
            return self.hidden
        # SwiGLU has three matrices where GELU has two: 8/3 keeps the parameters equal (Shazeer
        # 2020). Multiples of 64 suit vector units and matrix tiles.
        return 4 * self.width if self.activation == "gelu" else -(-8 * self.width // (3 * 64)) * 64

    def resolved(self) -> "DecoderConfig":
        """Return these settings with numbers in place of each 0 that means a default."""
        return self.replace(kv_heads=self.key_value_heads, hidden=self.hidden_width)

    @classmethod
    def shapes(cls) -> Mapping[str, "DecoderConfig"]:
        return SHAPES

    def build(self, part: Part | None = None) -> "Decoder":
        from mpillm.models.layers.decoder_stack import Decoder

        return Decoder(self, part)

    def describe(self) -> str:
        return (
            f"{self.layers} layers, width {self.width}, {self.heads} heads "
            f"({self.key_value_heads} of keys and values), context {self.context}, "
            f"vocabulary {self.vocab_size:,}"
        )

    @property
    def blocks(self) -> int:
        return self.layers

    @property
    def stream_widths(self) -> tuple[int, ...]:
        return (self.width,)

    @property
    def tied_weights(self) -> Mapping[str, str]:
        return {"head.weight": "embedding.weight"} if self.tied else {}

    @property
    def drops(self) -> bool:
        return bool(self.dropout or self.attention_dropout or self.embedding_dropout)

    @property
    def cut_dims(self) -> Mapping[str, int]:
        # Megatron's cut (Shoeybi et al. 2019): columns into heads and hidden features, rows back
        # out of them.
        columns = ("query", "key", "value", "gate", "up")
        rows = ("attention.output.weight", "feed_forward.down.weight")
        return {
            **{f"{name}.{kind}": 0 for name in columns for kind in ("weight", "bias")},
            **dict.fromkeys(rows, 1),
            "embedding.weight": 0,
            "head.weight": 0,
        }

    def _block_products(self) -> int:
        """Count the weights of one block's matrix products."""
        key_value = self.key_value_heads * self.head_width
        attention = 2 * self.width * self.width + 2 * key_value * self.width
        matrices = 3 if self.activation == "swiglu" else 2
        return attention + matrices * self.hidden_width * self.width

    def _block_vectors(self) -> int:
        """Count the norms' and biases' numbers of one block."""
        norms = 2 * self._norm_parameters()
        if not self.bias:
            return norms
        key_value = self.key_value_heads * self.head_width
        hidden = self.hidden_width * (2 if self.activation == "swiglu" else 1)
        return norms + 3 * self.width + 2 * key_value + hidden

    def _norm_parameters(self) -> int:
        return self.width * (2 if self.norm == "layernorm" else 1)

    def parameters_of(self, part: Part) -> int:
        embedding = self.vocab_size * self.width
        total = part.count * (self._block_products() + self._block_vectors())
        if self.begins(part):
            total += embedding + (self.context * self.width if self.positions == "learned" else 0)
        if self.ends(part):
            shared = self.tied and self.begins(part)
            total += self._norm_parameters() + (0 if shared else embedding)
        return total

    @property
    def block_flops(self) -> tuple[float, ...]:
        """6 for each weight of a product, and 12 · width · context for the attention.

        Source: PaLM, Chowdhery et al. 2022, appendix B.
        """
        flops = 6 * self._block_products() + 12 * self.width * self.context
        return (flops,) * self.layers

    @property
    def end_flops(self) -> tuple[float, float]:
        """0 for the embedding, a gather; 6 for each weight of the head's product.

        The loss is not counted: the head's one large product runs faster per FLOP than a block's
        many small ones. Head and loss together take 0.9 to 1.0 of the time that this count predicts
        (benchmarks/bubble.py).
        """
        return 0.0, 6 * self.vocab_size * self.width

    # What autograd saves of one token in a block, tensor by tensor: these three counts follow
    # layers/attention.py and layers/block.py. tests/models/test_saved_bytes.py compares both.

    def _norm_saved(self, element_bytes: int) -> int:
        """Count a norm: its input. In 16 bits RMSNorm keeps it in float32, with the normalised
        values.
        """
        if self.norm == "rmsnorm":
            return (1 if element_bytes == 4 else 2) * 4 * self.width + 4
        return element_bytes * self.width + 2 * 4

    def _attention_saved(self, element_bytes: int) -> int:
        """Count an attention: the results of norm, query, key, value and of the attention, and the
        logarithm of each head's sum. With dropout the probabilities instead, twice, and a mask.
        """
        key_value = self.key_value_heads * self.head_width
        if not self.attention_dropout:
            return element_bytes * (3 * self.width + 2 * key_value) + 4 * self.heads
        if key_value < self.width:
            # Grouped heads are repeated: that path has no kernel for groups.
            key_value = self.width
        probabilities = self.heads * self.context * (4 + 1 + element_bytes)
        return element_bytes * (3 * self.width + 2 * key_value) + probabilities

    def _feed_forward_saved(self, element_bytes: int) -> int:
        """Count a feed-forward: the norm's result; gate, its SiLU, up and their product for SwiGLU,
        up and its GELU else.
        """
        hidden = self.hidden_width * (4 if self.activation == "swiglu" else 2)
        return element_bytes * (self.width + hidden)

    def _block_saved(self, element_bytes: int, recompute: LayerRecompute) -> tuple[int, int]:
        """Return the bytes of one token and block that are kept, and that are computed again."""
        stream, mask = element_bytes * self.width, self.width if self.dropout else 0
        norm = self._norm_saved(element_bytes)
        attention = norm + self._attention_saved(element_bytes)
        feed_forward = norm + self._feed_forward_saved(element_bytes)
        if recompute == "full":
            return stream, attention + feed_forward + 2 * mask - stream
        if recompute == "attention":
            # Those of the feed-forward are freed before the attention runs again.
            again = attention + self._attention_working(element_bytes) - feed_forward
            return stream + feed_forward + 2 * mask, max(0, again)
        return attention + feed_forward + 2 * mask, 0

    def _attention_working(self, element_bytes: int) -> int:
        """Count a token's temporary results in the backward pass of an attention."""
        probabilities = self.heads * self.context * 8 if self.attention_dropout else 0
        return 2 * element_bytes * self.width + probabilities

    def activation_bytes(self, part: Part, rows: int, element_bytes: int = 4) -> int:
        return self.recompute_bytes(part, rows, element_bytes, "none")[0]

    def recompute_bytes(
        self, part: Part, rows: int, element_bytes: int, recompute: Recompute
    ) -> tuple[int, int]:
        tokens = rows * self.context
        kept, again = 0, 0
        for kind, count in recompute_counts(recompute, part).items():
            saved, once_more = self._block_saved(element_bytes, kind)
            kept += count * saved
            again = max(again, once_more)
        if isinstance(recompute, int):
            # The backward pass has freed the blocks after the last one that is computed again.
            after = part.last % recompute
            again = max(0, again - after * self._block_saved(element_bytes, "none")[0])
        separate = self.positions == "learned" or self.embedding_dropout > 0
        if self.begins(part) and separate:
            # The embedding's outputs, where the first block reads others.
            kept += element_bytes * self.width + (self.width if self.embedding_dropout else 0)
        if self.ends(part):
            kept += self._norm_saved(element_bytes)
        return tokens * kept, tokens * again

    def working_bytes(self, rows: int, element_bytes: int = 4) -> int:
        """Count the gradients of the stream and inside the feed-forward."""
        features = 2 * self.width + 2 * self.hidden_width
        if self.activation == "gelu":
            features = 3 * self.width + self.hidden_width
        return rows * self.context * element_bytes * features

    def scoring_bytes(self, rows: int, element_bytes: int = 4) -> int:
        """Count the streams and the insides of the feed-forward, or of an attention with rotary
        positions.
        """
        inside = self.hidden_width * (3 if self.activation == "swiglu" else 2)
        features = max(4 * self.width + inside, 9 * self.width)
        return rows * self.context * element_bytes * features

    def output_bytes(self, rows: int, device: str = "cpu") -> int:
        """Count a loss in chunks with the gradients that it holds: of hidden states and head.

        A task that reads plain logits takes more: 3 times their bytes in float32.
        """
        return head_bytes(rows * self.context, self.width, self.vocab_size, device)

    def logits_bytes(self, rows: int, device: str = "cpu") -> int:
        """Count one chunk of logits."""
        return chunk_bytes(rows * self.context, self.vocab_size, device)


def _gpt2(layers: int, width: int, heads: int) -> DecoderConfig:
    return DecoderConfig(
        layers=layers,
        width=width,
        heads=heads,
        context=1024,
        vocab_size=50257,
        norm="layernorm",
        positions="learned",
        activation="gelu",
        bias=True,
        tied=True,
    )


# GPT-2: Radford et al. 2019, table 2 (with the counts of the released weights). Llama: the released
# 3.2 1B and 3.1 8B.
SHAPES: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "tiny": DecoderConfig(layers=4, width=128, heads=4, context=256),
        "small": DecoderConfig(layers=6, width=256, heads=8, kv_heads=4, context=512),
        "medium": DecoderConfig(layers=12, width=512, heads=8, kv_heads=4, context=1024),
        "gpt2-124m": _gpt2(12, 768, 12),
        "gpt2-355m": _gpt2(24, 1024, 16),
        "gpt2-774m": _gpt2(36, 1280, 20),
        "gpt2-1558m": _gpt2(48, 1600, 25),
        "llama-1b": DecoderConfig(
            layers=16,
            width=2048,
            heads=32,
            kv_heads=8,
            hidden=8192,
            context=8192,
            vocab_size=128256,
            rope_theta=500000.0,
        ),
        "llama-8b": DecoderConfig(
            layers=32,
            width=4096,
            heads=32,
            kv_heads=8,
            hidden=14336,
            context=8192,
            vocab_size=128256,
            rope_theta=500000.0,
            tied=False,
        ),
    }
)
