"""The decoder architecture: its module and its named shapes; needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mpillm.models.decoder_costs import DecoderCosts
from mpillm.models.spec import Part

if TYPE_CHECKING:
    from mpillm.models.stacks.decoder_stack import Decoder


@dataclass(frozen=True)
class DecoderConfig(DecoderCosts):
    """A pre-norm Transformer decoder. Lengths are in tokens, widths in features."""

    @classmethod
    def shapes(cls) -> Mapping[str, "DecoderConfig"]:
        return SHAPES

    def build(self, part: Part | None = None) -> "Decoder":
        from mpillm.models.stacks.decoder_stack import Decoder

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


def _qwen(layers: int, width: int, heads: int, hidden: int, **switches: Any) -> DecoderConfig:
    return DecoderConfig(
        layers=layers,
        width=width,
        heads=heads,
        hidden=hidden,
        vocab_size=151936,
        rope_theta=1000000.0,
        norm_epsilon=1e-6,
        **switches,
    )


def _gemma(layers: int, width: int, heads: int, hidden: int, **switches: Any) -> DecoderConfig:
    return DecoderConfig(
        layers=layers,
        width=width,
        heads=heads,
        hidden=hidden,
        head_width=256,
        norm="rmsnorm1p",
        activation="geglu",
        scaled_embedding=True,
        norm_epsilon=1e-6,
        **switches,
    )


_GEMMA3: Mapping[str, Any] = MappingProxyType(
    {
        "kv_heads": 1,
        "context": 32768,
        "vocab_size": 262144,
        "norm_place": "sandwich",
        "query_key_norm": True,
        "window": 512,
        "full_every": 6,
        "rope_theta": 1000000.0,
        "window_rope_theta": 10000.0,
    }
)

# GPT-2: Radford et al. 2019, table 2 (with the counts of the released weights). Llama: the released
# 3.2 1B and 3.1 8B, at the context before their scaling. The others: their released config.json.
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
        "smollm2-135m": DecoderConfig(
            layers=30,
            width=576,
            heads=9,
            kv_heads=3,
            hidden=1536,
            context=8192,
            vocab_size=49152,
            rope_theta=100000.0,
        ),
        "mistral-7b": DecoderConfig(
            layers=32,
            width=4096,
            heads=32,
            kv_heads=8,
            hidden=14336,
            context=32768,
            vocab_size=32000,
            window=4096,
            tied=False,
        ),
        "mixtral-8x7b": DecoderConfig(
            layers=32,
            width=4096,
            heads=32,
            kv_heads=8,
            hidden=14336,
            experts=8,
            experts_per_token=2,
            context=32768,
            vocab_size=32000,
            rope_theta=1000000.0,
            tied=False,
        ),
        "qwen2.5-0.5b": _qwen(24, 896, 14, 4864, kv_heads=2, context=32768, qkv_bias=True),
        "qwen3-0.6b": _qwen(
            28, 1024, 16, 3072, kv_heads=8, head_width=128, context=40960, query_key_norm=True
        ),
        "gemma-2b": _gemma(18, 2048, 8, 16384, kv_heads=1, context=8192, vocab_size=256000),
        "gemma2-2b": _gemma(
            26,
            2304,
            8,
            9216,
            kv_heads=4,
            context=8192,
            vocab_size=256000,
            norm_place="sandwich",
            window=4096,
            full_every=2,
            attention_soft_cap=50.0,
            logits_soft_cap=30.0,
        ),
        "gemma3-270m": _gemma(18, 640, 4, 2048, **_GEMMA3),
        "gemma3-1b": _gemma(26, 1152, 4, 6912, **_GEMMA3),
    }
)
