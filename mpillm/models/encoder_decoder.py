"""The encoder-decoder architecture: its module and its named shapes; needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mpillm.models.encoder_decoder_costs import EncoderDecoderCosts
from mpillm.models.spec import Part

if TYPE_CHECKING:
    from mpillm.models.stacks.encoder_decoder_stack import EncoderDecoder


@dataclass(frozen=True)
class EncoderDecoderConfig(EncoderDecoderCosts):
    """A Transformer of two stacks. Lengths are in tokens, widths in features."""

    @classmethod
    def shapes(cls) -> Mapping[str, "EncoderDecoderConfig"]:
        return SHAPES

    def build(self, part: Part | None = None) -> "EncoderDecoder":
        from mpillm.models.stacks.encoder_decoder_stack import EncoderDecoder

        return EncoderDecoder(self, part)

    def describe(self) -> str:
        source = f"{self.mels} mels" if self.mels else "text"
        return (
            f"{self.layers} + {self.decoder_blocks} layers, width {self.width}, "
            f"{self.heads} heads, source {self.source_context} ({source}), "
            f"context {self.context}, vocabulary {self.vocab_size:,}"
        )


def _t5(layers: int, width: int, heads: int, hidden: int, **switches: Any) -> EncoderDecoderConfig:
    return EncoderDecoderConfig(
        **{
            "layers": layers,
            "width": width,
            "heads": heads,
            "head_width": 64,
            "hidden": hidden,
            "context": 512,
            "source_context": 512,
            "vocab_size": 32128,
            "query_scale_width": 1.0,
            "norm_epsilon": 1e-6,
            **switches,
        }
    )


def _whisper(layers: int, width: int, heads: int) -> EncoderDecoderConfig:
    return EncoderDecoderConfig(
        layers=layers,
        width=width,
        heads=heads,
        context=448,
        source_context=1500,
        mels=80,
        vocab_size=51865,
        norm="layernorm",
        positions="sinusoidal",
        decoder_positions="learned",
        sinusoid_ends=True,
        activation="gelu-exact",
        bias=True,
        key_bias=False,
    )


# Their released config.json: t5-small, google/t5-v1_1-base (the form of flan-t5-base), an
# opus-mt model, whisper-tiny and whisper-base.
SHAPES: Mapping[str, EncoderDecoderConfig] = MappingProxyType(
    {
        "t5-tiny": _t5(
            2,
            128,
            4,
            256,
            head_width=32,
            context=128,
            source_context=128,
            vocab_size=0,
            activation="geglu",
        ),
        "t5-small": _t5(6, 512, 8, 2048, activation="relu", scaled_head=True),
        "t5-v1.1-base": _t5(12, 768, 12, 2048, activation="geglu", tied=False),
        "marian-base": EncoderDecoderConfig(
            layers=6,
            width=512,
            heads=8,
            hidden=2048,
            context=512,
            source_context=512,
            vocab_size=58101,
            norm="layernorm",
            norm_place="post",
            positions="sinusoidal",
            activation="silu",
            bias=True,
            scaled_embedding=True,
            head_bias=True,
        ),
        "whisper-tiny": _whisper(4, 384, 6),
        "whisper-base": _whisper(6, 512, 8),
    }
)
