"""The settings of an encoder-decoder: those of its blocks, and of its ends."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from mpillm.errors import RecipeError
from mpillm.models.block_settings import BlockSettings, NotNegative, Positive
from mpillm.models.spec import OutputKind, Part


@dataclass(frozen=True)
class EncoderDecoderSettings(BlockSettings):
    """An encoder that reads a source, and a causal decoder that attends to the encoder's outputs.

    The blocks of both have the same settings. `layers` are those of the encoder, `context` is the
    decoder's.
    """

    shared_inputs: ClassVar[tuple[str, ...]] = ("source_lengths", "ids")
    host_inputs: ClassVar[tuple[str, ...]] = ("source_lengths",)

    architecture: str = "encoder-decoder"
    decoder_layers: NotNegative = 0
    """0: as many as `layers`."""
    source_context: Positive = 256
    """The longest source, in tokens; of sound in positions, one for two frames."""
    mels: NotNegative = 0
    """The features of a frame of sound, which two convolutions embed; 0: the source is text."""
    norm_place: Literal["pre", "post"] = "pre"
    """`post`: norms of the stream after each was added, and none at the end of a stack."""
    positions: Literal["relative", "sinusoidal"] = "relative"
    decoder_positions: Literal["same", "learned"] = "same"
    """`learned`: the decoder's are a table, which is added to its embedding."""
    sinusoid_ends: bool = False
    """Whether the slowest sinusoid has 1/10000 of the fastest one's angles, and not almost it."""
    query_scale_width: float = 0.0
    tied: bool = True
    """The output head is the token embedding."""
    scaled_embedding: bool = False
    """The embeddings' outputs times √width."""
    scaled_head: bool = False
    """The head's inputs divided by √width."""
    head_bias: bool = False
    """A bias of each token's logit."""
    start_token: int = -1
    """The id that generation begins with; -1: the padding token, or the end of text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window:
            raise RecipeError(
                f"window = {self.window}: an encoder-decoder attends to all positions; drop it"
            )
        if self.mels and self.positions != "sinusoidal":
            raise RecipeError(
                f"mels = {self.mels}: a source of sound has sinusoidal positions; "
                'set positions = "sinusoidal", or drop mels'
            )
        if self.start_token >= self.vocab_size > 0:
            raise RecipeError(
                f"start_token = {self.start_token} is not in a vocabulary of {self.vocab_size:,}; "
                "name one of its ids, or leave it out for the padding token"
            )
        self._check_relative()
        self._check_sinusoids(self.sinusoid_ends)

    def _check_relative(self) -> None:
        # An encoder has half of the buckets for each direction, of which half are exact: one or
        # more. The decoder's ranges begin at half of them all, and end at the longest distance.
        buckets, distance = self.relative_buckets, self.relative_distance
        if self.positions == "relative" and not 4 <= buckets < 2 * distance:
            raise RecipeError(
                f"relative_buckets = {buckets} with relative_distance = {distance}: classes of "
                "distances are 4 or more, and fewer than twice the distance; T5 has 32 and 128"
            )

    @property
    def any_length(self) -> bool:
        return True

    @property
    def uncut_reason(self) -> str:
        return "an encoder-decoder's attention to its source is not cut yet"

    @property
    def decoder_blocks(self) -> int:
        return self.decoder_layers or self.layers

    @property
    def blocks(self) -> int:
        return self.layers + self.decoder_blocks

    @property
    def usual_task(self) -> str:
        return "seq2seq"

    @property
    def source_field(self) -> str:
        return "frames" if self.mels else "source"

    @property
    def input_field(self) -> str:
        return self.source_field

    @property
    def input_item(self) -> tuple[int, ...]:
        return (self.mels,) if self.mels else ()

    @property
    def output_kind(self) -> OutputKind:
        return "next tokens of a target"

    def resolved(self) -> Self:
        return super().resolved().replace(decoder_layers=self.decoder_blocks)

    def encoder_part(self, part: Part) -> Part:
        """Return the encoder's blocks in `part`, numbered from 0."""
        return Part(min(part.first, self.layers), min(part.last, self.layers))

    def decoder_part(self, part: Part) -> Part:
        """Return the decoder's blocks in `part`, numbered from 0."""
        return Part(max(part.first - self.layers, 0), max(part.last - self.layers, 0))

    def begins_decoder(self, part: Part) -> bool:
        """Return whether `part` holds the decoder's first block, and so embeds its tokens."""
        return part.first <= self.layers < part.last

    @property
    def stream_widths(self) -> tuple[int, ...]:
        return self.width, self.width

    def streams_ahead(self, block: int, length: int = 0) -> tuple[tuple[int, int], ...]:
        memory = self.source_context, self.width
        if block <= self.layers:
            return (memory,)
        return memory, (length or self.context, self.width)

    @property
    def tied_weights(self) -> Mapping[str, str]:
        found = {} if self.mels else {"embedding.weight": "source_embedding.weight"}
        if self.tied:
            found["head.weight"] = "embedding.weight" if self.mels else "source_embedding.weight"
        if self.positions == "relative":
            # The layers of a stack share one table. Each has a name of its own: a pipeline may cut
            # between any two.
            for stack, count in (("encoder", self.layers), ("decoder", self.decoder_blocks)):
                table = "attention.relative.table.weight"
                found |= {
                    f"{stack}.{number}.{table}": f"{stack}.0.{table}" for number in range(1, count)
                }
        return found
