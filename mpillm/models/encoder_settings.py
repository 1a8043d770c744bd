"""The settings of an encoder: those of its blocks, and of its ends."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

from mpillm.errors import RecipeError
from mpillm.models.block_settings import (
    BlockSettings,
    NotNegative,
    Positive,
    PositiveNumber,
    check_dropout,
)
from mpillm.models.spec import ModelSpec, OutputKind

Head = Literal["lm", "sequence", "token", "span", "ctc", "none"]
# The modules of the head. The norm after the last block belongs to the body.
HEAD_WEIGHTS = ("head.", "head_dense.", "head_norm.")
HEAD_KEYS = ("head_layer", "head_bias", "head_dropout", "pooling", "tied")
OUTPUT_KINDS: Mapping[Head, OutputKind] = MappingProxyType(
    {
        "lm": "hidden tokens",
        "sequence": "a class of each row",
        "token": "a class of each position",
        "span": "the ends of a span",
        "ctc": "aligned tokens",
        "none": "hidden states",
    }
)


@dataclass(frozen=True)
class EncoderSettings(BlockSettings):
    """A Transformer encoder: blocks that attend to both sides, between an embedding and a head.

    The defaults are a BERT without token types. It reads tokens, or images where `image_size` is
    set, or sound where `mels` is.
    """

    shared_inputs: ClassVar[tuple[str, ...]] = ("documents", "lengths")
    host_inputs: ClassVar[tuple[str, ...]] = ("documents", "lengths")
    causal: ClassVar[bool] = False
    generates: ClassVar[bool] = False

    architecture: str = "encoder"
    norm: Literal["layernorm", "layernorm-nobias", "rmsnorm", "rmsnorm1p"] = "layernorm"
    norm_place: Literal["post", "pre", "sandwich"] = "post"
    positions: Literal["learned", "rotary", "sinusoidal", "none"] = "learned"
    activation: Literal["gelu-exact", "gelu", "swiglu", "geglu", "geglu-exact"] = "gelu-exact"
    bias: bool = True
    norm_epsilon: PositiveNumber = 1e-12
    position_offset: NotNegative = 0
    """Rows of the learned positions ahead of the first one's; no position reads them (RoBERTa)."""
    token_types: NotNegative = 0
    """Kinds of tokens, such as of a first and of a second text, with an embedding each."""
    embedding_norm: bool = True
    """A norm of the summed embeddings."""
    image_size: NotNegative = 0
    """Height and width of images, in pixels; 0: it reads no images. `context` is then computed."""
    patch_size: Positive = 16
    """Height and width of a patch, in pixels, which becomes one position."""
    channels: Positive = 3
    mels: NotNegative = 0
    """The features of a frame of sound, of which two become one position; 0: it reads no sound."""
    head: Head = "lm"
    """`lm` and `ctc`: logits of the vocabulary at each position. `sequence`: of classes; `token`:
    of classes at each position. `span`: of each position as the first, and as the last, of a span.
    `none`: the hidden states themselves.
    """
    head_layer: Literal["norm", "tanh", "none"] = "norm"
    """A product ahead of the head's own one: with the activation and a norm, or with a tanh."""
    head_bias: bool = True
    tied: bool = True
    """The head of `lm` is the token embedding."""
    pooling: Literal["first", "mean", "last"] = "first"
    """The position that `sequence` reads, or the mean of all of them."""
    classes: NotNegative = 0
    """0: taken from the data."""
    head_dropout: float = 0.0
    """Dropout of what the last product reads, of `sequence`, `token` and `span`."""

    def __post_init__(self) -> None:
        if self.image_size:
            self._check_images()
            # A frozen dataclass: no other value is possible.
            object.__setattr__(self, "context", (self.image_size // self.patch_size) ** 2 + 1)
        super().__post_init__()
        check_dropout("head_dropout", self.head_dropout)
        if self.mels and self.image_size:
            raise RecipeError(
                f"mels = {self.mels} and image_size = {self.image_size}: an encoder reads sound, "
                "or images; drop one of them"
            )
        if not self.reads_tokens and (self.token_types or self.head == "lm"):
            raise RecipeError(
                f'head = "{self.head}" with token_types = {self.token_types} is of tokens, and '
                "this encoder reads none; set another head, and no token_types"
            )
        self._check_sinusoids(ends=True)

    def _check_images(self) -> None:
        if self.image_size % self.patch_size:
            whole = self.image_size // self.patch_size * self.patch_size
            raise RecipeError(
                f"image_size = {self.image_size} is not a multiple of patch_size = "
                f"{self.patch_size}; take {whole or self.patch_size} or another patch_size"
            )
        if self.positions != "learned" or self.position_offset:
            raise RecipeError(
                'an encoder of images has positions = "learned" without a position_offset; '
                "drop both keys"
            )

    @property
    def reads_tokens(self) -> bool:
        return not (self.image_size or self.mels)

    @property
    def input_field(self) -> str:
        return "pixels" if self.image_size else "frames" if self.mels else "ids"

    @property
    def input_item(self) -> tuple[int, ...]:
        if self.image_size:
            return self.channels, self.image_size, self.image_size
        return (self.mels,) if self.mels else ()

    @property
    def output_kind(self) -> OutputKind:
        return OUTPUT_KINDS[self.head]

    @property
    def uncut_reason(self) -> str:
        if self.head != "lm":
            return f'an encoder with head = "{self.head}" reads whole sequences after its layers'
        return super().uncut_reason

    @property
    def head_rows(self) -> int:
        """How many numbers the last product gives for a position; 0: there is none."""
        if self.head == "none":
            return 0
        if self.head in ("lm", "ctc"):
            return self.vocab_size
        return 2 if self.head == "span" else self.classes

    @property
    def ends_in_norm(self) -> bool:
        """Whether a norm follows the last block: a post-norm block has its own."""
        return self.norm_place != "post"

    def resolved(self) -> Self:
        """Return them also with the default in place of each setting that has no effect."""
        unused: dict[str, Any] = {}
        if not self.reads_tokens and self.head != "ctc":
            unused["vocab_size"] = 0
        if not self.image_size:
            unused |= {"patch_size": 16, "channels": 3}
        if self.head not in ("sequence", "token"):
            unused["classes"] = 0
        if self.head not in ("sequence", "token", "span"):
            unused["head_dropout"] = 0.0
        if self.head != "lm":
            unused["tied"] = True
        if self.head == "none":
            unused["head_bias"] = True
        if self.head != "sequence" and (self.head != "none" or self.head_layer == "none"):
            unused["pooling"] = "first"
        return super().resolved().replace(**unused)

    @property
    def usual_task(self) -> str:
        # As transformers reads a head of one number.
        of_text = "regression" if self.classes == 1 else "sequence-classification"
        classes = "image-classification" if self.image_size else of_text
        tasks = {"lm": "masked-lm", "sequence": classes, "token": "token-classification"}
        return {**tasks, "ctc": "ctc", "span": "question-answering"}.get(self.head, "")

    def inherited(self, given: Mapping[str, Any]) -> dict[str, Any]:
        # Classes are those of the data, and another head has settings of its own.
        taken = {**super().inherited({}), "classes": 0}
        if given.get("head", self.head) != self.head:
            taken = {name: value for name, value in taken.items() if name not in HEAD_KEYS}
            taken |= self._usual_head(given["head"])
        return {**taken, **given}

    def _usual_head(self, head: Any) -> dict[str, Any]:
        """Return the settings of `head` in the published family of this model; none without one."""
        # Imported here: a family builds these settings.
        from mpillm.models.families.encoder_family import EncoderFamily
        from mpillm.models.families.family_catalog import family_of

        try:
            family = family_of(self)
            assert isinstance(family, EncoderFamily)
            usual = family.with_head(self, head)
        except RecipeError:
            return {}
        return {name: getattr(usual, name) for name in HEAD_KEYS}

    @property
    def any_length(self) -> bool:
        return not (self.image_size or self.mels)

    def new_weights(self, source: ModelSpec, same_classes: bool = True) -> tuple[str, ...]:
        if not isinstance(source, EncoderSettings):
            return ()
        ours, theirs = self.resolved(), source.resolved()
        names = ("head", "head_layer", "pooling")
        if any(getattr(ours, name) != getattr(theirs, name) for name in names):
            # Also those of the same name and shape: they mean something else.
            return HEAD_WEIGHTS
        return () if ours.classes == theirs.classes and same_classes else HEAD_WEIGHTS[:1]

    @property
    def drops(self) -> bool:
        return super().drops or self.head_dropout > 0

    def streams_ahead(self, block: int, length: int = 0) -> tuple[tuple[int, int], ...]:
        # The length of an image is no setting of a batch.
        return super().streams_ahead(block, 0 if self.image_size else length)

    @property
    def tied_weights(self) -> Mapping[str, str]:
        tied = self.head == "lm" and self.tied
        return {"head.weight": "embedding.weight"} if tied else {}
