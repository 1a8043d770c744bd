"""The facts of a dataset and of a model that a task is made with: plain numbers, without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

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

    @property
    def padding(self) -> int | None:
        """The id of the padding token; None where the tokenizer has none."""
        return next((self.special[text] for text in PADDINGS if text in self.special), None)


@dataclass(frozen=True)
class Lengths:
    """The lengths of a model's rows: positions of its targets, and of a source."""

    context: int = 256
    source_context: int = 256

    @classmethod
    def of(cls, spec: ModelSpec) -> "Lengths":
        return cls(spec.context, spec.source_context)
