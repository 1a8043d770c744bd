"""The decoder architecture: its module and its named shapes; needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from mpillm.models.decoder_costs import DecoderCosts
from mpillm.models.spec import Part

if TYPE_CHECKING:
    from mpillm.models.layers.decoder_stack import Decoder


@dataclass(frozen=True)
class DecoderConfig(DecoderCosts):
    """A pre-norm Transformer decoder. Lengths are in tokens, widths in features."""

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
