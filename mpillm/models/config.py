"""The shape of a decoder: its settings, the named shapes, and what follows from the numbers alone (no torch)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from mpillm.errors import RecipeError

Positive = Annotated[int, Gt(0)]


@dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm Transformer decoder. Lengths are in tokens, widths in features."""

    layers: Positive = 4
    width: Positive = 128
    heads: Positive = 4
    kv_heads: Annotated[int, Ge(0)] = 0
    """Heads of keys and values (grouped-query attention); 0: as many as `heads`."""
    hidden: Annotated[int, Ge(0)] = 0
    """Width inside the feed-forward; 0: 4 × width for GELU, 8/3 × width rounded up to a multiple of 64 for SwiGLU."""
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

    def __post_init__(self) -> None:
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
                f"rotary positions need an even width a head, and {self.width} / {self.heads} is {self.head_width}"
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
        return 4 * self.width if self.activation == "gelu" else -(-8 * self.width // (3 * 64)) * 64

    @property
    def parameters(self) -> int:
        """The number of trainable numbers, a tied head counted once."""
        return sum(rows * columns for rows, columns in self.matrices()) + self._vectors()

    def matrices(self) -> list[tuple[int, int]]:
        """(rows, columns) of each weight matrix and embedding."""
        key_value = self.key_value_heads * self.head_width
        attention = [(self.width, self.width)] * 2 + [(key_value, self.width)] * 2
        forward = [(self.hidden_width, self.width)] * (3 if self.activation == "swiglu" else 2)
        embeddings = [(self.vocab_size, self.width)] * (1 if self.tied else 2)
        if self.positions == "learned":
            embeddings.append((self.context, self.width))
        return (attention + forward) * self.layers + embeddings

    def _vectors(self) -> int:
        norm = self.width * (2 if self.norm == "layernorm" else 1)
        key_value = self.key_value_heads * self.head_width
        biases = 2 * self.width + 2 * key_value + self.width
        biases += self.hidden_width * (2 if self.activation == "swiglu" else 1)
        return self.layers * (2 * norm + (biases if self.bias else 0)) + norm

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward for one token.

        6 for each weight of a matrix product, and 12 · layers · width · context for the attention itself, as in
        PaLM (Chowdhery et al. 2022), appendix B. A look-up in an embedding costs nothing; the head is a product.
        """
        products = self.parameters - self._vectors()
        if not self.tied:
            products -= self.vocab_size * self.width
        if self.positions == "learned":
            products -= self.context * self.width
        return 6 * products + 12 * self.layers * self.width * self.context

    def activation_bytes(self, rows: int, bytes_per_element: int = 4) -> int:
        """Bytes that the forward pass of `rows` sequences keeps for the backward: an estimate.

        Per layer and token: the inputs of the norms, the products and the activation (about 8 widths, the keys and
        values, and 3 hidden widths for SwiGLU, 2 for GELU); the attention keeps no T × T matrix. Besides them the
        logits and their gradient, in float32.
        """
        tokens = rows * self.context
        key_value = self.key_value_heads * self.head_width
        hidden = self.hidden_width * (4 if self.activation == "swiglu" else 2)
        layer = 8 * self.width + 2 * key_value + hidden
        return tokens * (self.layers * layer * bytes_per_element + 2 * self.vocab_size * 4)


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


# GPT-2: Radford et al. 2019, table 2 (with the counts of the released weights). Llama: the released 3.2 1B and 3.1 8B.
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
