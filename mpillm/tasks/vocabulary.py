"""The facts of a dataset and of a model that a task is made with: plain numbers, without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpillm.models.spec import ModelSpec

# What tokenizers call the token that fills the end of short rows.
PADDINGS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a dataset: those of its tokenizer and, of a classification, its classes."""

    size: int
    end_of_text: int = 0
    special: Mapping[str, int] = field(default_factory=dict)
    """The tokens that were added to the tokenizer's model, by their texts."""
    classes: tuple[str, ...] = ()
    """The names of the labels, in the order of their numbers."""
    space: int | None = None
    """The token that alone parts words; None where other tokens hold spaces, too."""

    @property
    def padding(self) -> int | None:
        """The id of the padding token; None where the tokenizer has none."""
        return next((self.special[text] for text in PADDINGS if text in self.special), None)


# Of Whisper's convolutions, which all models of sound begin with.
FRAMES_A_POSITION = 2


def positions_of(frames: Any) -> Any:
    """Return the positions of so many frames of sound; of an array or a tensor, of each number."""
    return -(-frames // FRAMES_A_POSITION)


@dataclass(frozen=True)
class Lengths:
    """The lengths of a model's rows: positions of its targets, and of a source."""

    context: int = 256
    source_context: int = 256
    trims: bool = False
    """The rows of a batch of tokens may be as short as its longest pair."""

    @property
    def frames(self) -> int:
        """The frames of sound in a row."""
        return FRAMES_A_POSITION * self.source_context

    @classmethod
    def of(cls, spec: ModelSpec) -> "Lengths":
        return cls(spec.context, spec.source_context, spec.any_length)
