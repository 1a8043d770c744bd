"""The base of all architectures: settings, and the numbers that layouts and plans need.

An architecture is one file: a frozen settings dataclass that derives from `ModelSpec`. Its fields
are the keys of the recipe's section [model]. Only `build` imports torch, so that a login node
without torch can plan. No room but `models` names an architecture.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mpillm.models.part_module import PartModule


OutputKind = Literal[
    "any",
    "next tokens",
    "next tokens of a target",
    "hidden tokens",
    "aligned tokens",
    "a class of each row",
    "a class of each position",
    "a number of each row",
    "a set of classes of each row",
    "the ends of a span",
    "hidden states",
]
"""What a task learns, and a model gives; `any`: of a plug-in that does not say."""
LayerRecompute = Literal["none", "attention", "full"]
Recompute = LayerRecompute | int
"""The activations that a backward pass computes again: those of the attention of each layer, of
each layer, or of every n-th layer.
"""


def recompute_of(recompute: Recompute, block: int) -> LayerRecompute:
    """Return what is computed again of block number `block` (from 0) of the whole model."""
    if isinstance(recompute, int):
        return "full" if (block + 1) % recompute == 0 else "none"
    return recompute


def recompute_counts(recompute: Recompute, part: "Part") -> dict[LayerRecompute, int]:
    """Count the blocks of `part` by what is computed again of each, without a loop over them."""
    if not isinstance(recompute, int):
        return {recompute: part.count}
    full = part.last // recompute - part.first // recompute
    return {"full": full, "none": part.count - full}


@dataclass(frozen=True)
class Part:
    """Blocks `first` to `last` − 1 of a model: what one stage of a pipeline holds.

    The part that holds block 0 begins the model (embeddings), the one that holds the last block
    ends it (head).
    """

    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first


class ModelSpec(ABC):
    """The settings of an architecture and what follows from them.

    FLOPs are floating-point operations of the forward and the backward pass. Widths are in
    features, lengths in tokens.
    """

    architecture: str
    """The architecture's name in the catalogue, or `package.module:Name` of a plug-in."""
    context: int
    """The longest sequence, in tokens."""
    vocab_size: int
    """0 in a recipe: taken from the data."""

    experts: int = 0
    """The experts of each mixture; 0: the model has none."""
    experts_per_token: int = 1
    """Those that a position passes, where there are experts."""

    shared_inputs: ClassVar[tuple[str, ...]] = ()
    """Fields of a batch that every part reads; other fields are read where the model begins or
    ends.
    """
    host_inputs: ClassVar[tuple[str, ...]] = ()
    """Fields that a model reads in host memory: training copies them to no device."""
    generates: ClassVar[bool] = True
    """Whether it continues text."""
    recomputes: ClassVar[tuple[LayerRecompute, ...]] = ()
    """What its parts can compute again in a backward pass: `full`, `attention`."""

    @classmethod
    def shapes(cls) -> "Mapping[str, ModelSpec]":
        """Return the settings of well-known sizes by name, for a recipe's `model.shape`."""
        return {}

    @abstractmethod
    def build(self, part: Part | None = None) -> "PartModule":
        """Return the module of `part` (None: the whole model) without initial values; imports
        torch.
        """

    @property
    @abstractmethod
    def blocks(self) -> int:
        """How many blocks there are: a pipeline may cut the model between any two."""

    @property
    @abstractmethod
    def stream_widths(self) -> tuple[int, ...]:
        """The widths of the tensors (B, T, width) that pass from one part to the next, in order."""

    def streams_ahead(self, block: int, length: int = 0) -> tuple[tuple[int, int], ...]:
        """Return (T, width) of each tensor that passes where the model is cut ahead of `block`.

        `length`: of the sequences; 0: the context. Override it where cuts differ, as those in an
        encoder and in a decoder do.
        """
        return tuple((length or self.context, width) for width in self.stream_widths)

    @property
    def stream_features(self) -> int:
        """The features of a sequence, over all its positions, that pass at the widest cut."""
        return max(sum(_features(self.streams_ahead(block))) for block in range(self.blocks))

    @property
    def largest_stream(self) -> int:
        """The same of the largest tensor alone."""
        return max(max(_features(self.streams_ahead(block))) for block in range(self.blocks))

    @property
    @abstractmethod
    def block_flops(self) -> tuple[float, ...]:
        """FLOPs of each block for one token."""

    @property
    @abstractmethod
    def end_flops(self) -> tuple[float, float]:
        """FLOPs for one token ahead of the first block (embeddings) and after the last (head)."""

    @abstractmethod
    def parameters_of(self, part: Part) -> int:
        """Count the parameters of `part`; a tied weight counts in each part that holds it."""

    def block_parameters_of(self, part: Part) -> tuple[int, int]:
        """Count the parameters of `part` outside of its blocks, and those of its largest block.

        The blocks are those that `PartModule.numbered_blocks` names: by default there are none.
        """
        return self.parameters_of(part), 0

    def expert_parameters_of(self, part: Part) -> int:
        """Count the parameters of the experts of `part`, which ranks may share out."""
        return 0

    @abstractmethod
    def activation_bytes(self, part: Part, rows: int, element_bytes: int = 4) -> int:
        """Estimate the bytes that the forward pass of `rows` sequences keeps for the backward pass
        of `part`.
        """

    def recompute_bytes(
        self, part: Part, rows: int, element_bytes: int, recompute: Recompute
    ) -> tuple[int, int]:
        """Estimate the bytes that the forward pass keeps under `recompute`, and those of a block.

        The second are held above the first while the backward pass computes the block again.
        """
        return self.activation_bytes(part, rows, element_bytes), 0

    def working_bytes(self, rows: int, element_bytes: int = 4) -> int:
        """Estimate the bytes of gradients of activations, and of temporary results, at once in the
        backward pass of `rows` sequences.
        """
        return 4 * rows * self.context * max(self.stream_widths) * element_bytes

    def scoring_bytes(self, rows: int, element_bytes: int = 4) -> int:
        """Estimate the bytes of a forward pass of `rows` sequences that keeps nothing, without
        logits.
        """
        return 2 * self.working_bytes(rows, element_bytes)

    @abstractmethod
    def output_bytes(self, rows: int, device: str = "cpu") -> int:
        """Estimate the bytes of outputs and loss for `rows` sequences, with their gradients.

        `device`: `cpu` or `cuda`, which may cut them into chunks of other lengths.
        """

    def logits_bytes(self, rows: int, device: str = "cpu") -> int:
        """Estimate the bytes of the outputs of `rows` sequences alone, for a loss without
        gradients.
        """
        return self.output_bytes(rows, device) // 2

    @abstractmethod
    def describe(self) -> str:
        """Return the main settings in one line, for the printed plan."""

    @property
    def source_context(self) -> int:
        """The longest source, in tokens or frames, where it is not the sequence itself."""
        return self.context

    @property
    def any_length(self) -> bool:
        """Whether a batch may have shorter rows than `context` and `source_context`."""
        return False

    @property
    def source_field(self) -> str:
        """The field that generation encodes ahead of the first token; "": there is none."""
        return ""

    start_token: int = -1
    """The id that generation from a source begins with; -1: the padding token, or the end of
    text.
    """

    @property
    def usual_task(self) -> str:
        """The task that such a model is made for, by name; "": there is none."""
        return "causal-lm"

    @property
    def output_kind(self) -> OutputKind:
        """What the part that ends the model gives: a task that learns something else is refused."""
        return "any"

    @property
    def input_field(self) -> str:
        """The field of a batch that the first block reads; "": it is not checked."""
        return ""

    @property
    def input_item(self) -> tuple[int, ...]:
        """The shape of a picture, (channels, height, width), or of a frame, (mels,); (): ids."""
        return ()

    @property
    def whole(self) -> Part:
        return Part(0, self.blocks)

    @property
    def parameters(self) -> int:
        """The parameters of the whole model, a tied weight counted once."""
        return self.parameters_of(self.whole)

    @property
    def flops_per_token(self) -> float:
        return sum(self.block_flops) + sum(self.end_flops)

    @property
    def whole_sequences(self) -> str:
        """Why ranks cannot share the positions of a sequence; "": they can.

        A part then takes the field `positions` (T,), and its attention another kernel.
        """
        return f"the architecture {self.architecture!r} computes whole sequences"

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        """The heads of queries, those of keys and values, and the width of a head, in each block;
        zeros where blocks have no such attention.
        """
        return 0, 0, 0

    @property
    def tied_weights(self) -> "Mapping[str, str]":
        """Tied weights: the follower's name → the leader's name, which is saved."""
        return {}

    @property
    def drops(self) -> bool:
        """Whether training has dropout: each part then reads the field `dropout_keys` (B,)."""
        return False

    def inherited(self, given: "Mapping[str, Any]") -> dict[str, Any]:
        """Return the keys of [model] of a run that starts from such a model; `given` override."""
        return {**asdict(self), **given}  # type: ignore[call-overload]

    def new_weights(self, source: "ModelSpec", same_classes: bool = True) -> tuple[str, ...]:
        """Return how the names of weights begin that a run from `source` initialises: those of
        another head.

        `same_classes`: whether both have the same names of classes, or names are not known.
        """
        return ()

    @property
    def cut_dims(self) -> "Mapping[str, int]":
        """The end of a weight's name → the dim along which tensor parallelism may cut it; others
        are replicated.
        """
        return {}

    @property
    def cut_units(self) -> "Mapping[str, int]":
        """The end of a weight's name → the equal units along its dim, such as heads, that a cut
        leaves whole; others may be cut anywhere.

        The ranks must divide the largest number of units. Where they do not divide a smaller one,
        as that of grouped key and value heads, such weights are replicated.
        """
        return {}

    @property
    def uncut_reason(self) -> str:
        """Why tensor parallelism cannot cut this model; "": it can."""
        return (
            "" if self.cut_dims else f"the architecture {self.architecture} names no such weights"
        )

    def begins(self, part: Part) -> bool:
        """Return whether `part` holds the first block, and so the embeddings."""
        return part.first == 0

    def ends(self, part: Part) -> bool:
        """Return whether `part` holds the last block, and so the head."""
        return part.last == self.blocks

    def replace(self, **changes: Any) -> Self:
        """Return these settings with `changes`; checks them again."""
        # ModelSpec itself is not a dataclass, each architecture is one.
        return replace(self, **changes)  # type: ignore[type-var]


def _features(streams: tuple[tuple[int, int], ...]) -> list[int]:
    return [length * width for length, width in streams]
