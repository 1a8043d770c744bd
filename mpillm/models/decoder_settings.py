"""The settings of a decoder: those of its blocks, and of its ends."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mpillm.models.block_settings import BlockSettings, NotNegativeNumber
from mpillm.models.spec import OutputKind


@dataclass(frozen=True)
class DecoderSettings(BlockSettings):
    """A Transformer decoder: causal blocks between an embedding and a head of the vocabulary."""

    architecture: str = "decoder"
    norm_place: Literal["pre", "sandwich"] = "pre"
    """`sandwich`: norms of the inputs, and of the outputs, of attention and feed-forward."""
    positions: Literal["rotary", "learned"] = "rotary"
    tied: bool = True
    """The output head is the token embedding."""
    scaled_embedding: bool = False
    """The embedding's outputs times √width."""
    logits_soft_cap: NotNegativeNumber = 0.0
    """Logits become cap × tanh(logit / cap); 0: as they are."""

    @property
    def input_field(self) -> str:
        return "ids"

    @property
    def output_kind(self) -> OutputKind:
        return "next tokens"

    @property
    def whole_sequences(self) -> str:
        if self.attention_dropout:
            return (
                f"model.attention_dropout = {self.attention_dropout:g} drops probabilities, which "
                "no rank has as a whole (model.dropout drops outputs of layers)"
            )
        if self.balance_loss:
            return f"model.balance_loss = {self.balance_loss:g} counts the choices of whole rows"
        return ""

    @property
    def tied_weights(self) -> Mapping[str, str]:
        return {"head.weight": "embedding.weight"} if self.tied else {}
