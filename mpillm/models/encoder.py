"""The encoder architecture: its module and its named shapes; needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from mpillm.models.encoder_costs import EncoderCosts
from mpillm.models.spec import Part

if TYPE_CHECKING:
    from mpillm.models.stacks.encoder_stack import Encoder


@dataclass(frozen=True)
class EncoderConfig(EncoderCosts):
    """A Transformer encoder. Lengths are in positions, widths in features."""

    @classmethod
    def shapes(cls) -> Mapping[str, "EncoderConfig"]:
        return SHAPES

    def build(self, part: Part | None = None) -> "Encoder":
        from mpillm.models.stacks.encoder_stack import Encoder

        return Encoder(self, part)

    def describe(self) -> str:
        given = f"vocabulary {self.vocab_size:,}"
        if self.image_size:
            given = f"images of {self.image_size} × {self.image_size}"
        if self.mels:
            given = f"sound of {self.mels} mels"
        classes = f" of {self.classes} classes" if self.classes else ""
        return (
            f"{self.layers} layers, width {self.width}, {self.heads} heads, "
            f"context {self.context}, {given}, head {self.head}{classes}"
        )


TINY = EncoderConfig(layers=2, width=128, heads=2, context=128, token_types=2)
MODERN = EncoderConfig(
    layers=22,
    width=768,
    heads=12,
    hidden=1152,
    context=8192,
    vocab_size=50368,
    norm="layernorm-nobias",
    norm_place="pre",
    first_norm=False,
    positions="rotary",
    activation="geglu-exact",
    bias=False,
    rope_theta=160000.0,
    window=128,
    full_every=3,
    full_first=1,
    window_rope_theta=10000.0,
    norm_epsilon=1e-5,
)
VIT = EncoderConfig(
    layers=12,
    width=768,
    heads=12,
    image_size=224,
    norm_place="pre",
    embedding_norm=False,
    head="sequence",
    head_layer="none",
)

# BERT: Devlin et al. 2019; the tiny one: Turc et al. 2019. The others: their released config.json.
# The other tiny ones are for tests and first trials.
SHAPES: Mapping[str, EncoderConfig] = MappingProxyType(
    {
        "bert-tiny": TINY,
        "bert-tiny-classes": TINY.replace(head="sequence", head_layer="tanh"),
        "modernbert-tiny": MODERN.replace(
            layers=4, width=128, heads=4, hidden=192, context=256, vocab_size=0, window=32
        ),
        "vit-tiny-digits": VIT.replace(
            layers=4, width=64, heads=4, image_size=8, patch_size=2, channels=1
        ),
        "sound-tiny": EncoderConfig(
            layers=4,
            width=128,
            heads=4,
            context=256,
            mels=80,
            norm_place="pre",
            positions="sinusoidal",
            embedding_norm=False,
            head="ctc",
            head_layer="none",
        ),
        "bert-base": EncoderConfig(
            layers=12, width=768, heads=12, context=512, vocab_size=30522, token_types=2
        ),
        "bert-large": EncoderConfig(
            layers=24, width=1024, heads=16, context=512, vocab_size=30522, token_types=2
        ),
        "roberta-base": EncoderConfig(
            layers=12,
            width=768,
            heads=12,
            context=512,
            vocab_size=50265,
            position_offset=2,
            token_types=1,
            norm_epsilon=1e-5,
        ),
        "modernbert-base": MODERN,
        "vit-base-16": VIT,
    }
)
