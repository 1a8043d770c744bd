"""A part of a model as a torch module on one device, and its initial values.

Modules know nothing of ranks. The names of weights are those of the whole model, whatever the part.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import xxhash
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpillm.errors import DataError, UsageError
from mpillm.models.linear_head import Outputs
from mpillm.models.spec import ModelSpec, Part, Recompute
from mpillm.system.messages import NO_MEMORY

_ASKED = re.compile(r"tried to allocate ([\d.]+ ?\w+)", re.IGNORECASE)
_OF_GPU = re.compile(r"(GPU \d+) has a total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+)")
# The words on the CPU of an embedding, of a loss in chunks, and of torch's cross_entropy.
_NO_SUCH_ID = re.compile(r"index out of range in self|(index|Target) \d+ is out of bounds")

Fields = Mapping[str, Tensor]
Streams = tuple[Tensor, ...]


class PartOutput(NamedTuple):
    """The tensors of a forward pass."""

    outputs: Outputs
    """The streams for the next part. Of the part that ends the model, its outputs: logits, or a
    head that a loss may read in chunks.
    """
    pivots: Streams
    """The inputs at which a split backward pass stops: received streams, then the outputs of
    embeddings.
    """
    balance: Tensor | None = None
    """What training adds to the loss, a scalar summed over the sequences; None: nothing."""


class WeightPiece(NamedTuple):
    """The part of a whole weight that a module holds."""

    shape: tuple[int, ...]
    """Of the whole weight."""
    place: tuple[slice, ...]
    """The index of the part in it."""


class GenerationCache:
    """The state of a model between steps of generation, of B rows."""

    length: int = 0
    """The positions it holds; of rows with unequally many those of the longest."""

    def cut(self, lengths_B: Tensor) -> None:
        """Forget all but the first `lengths_B` positions of each row: what follows is padding.

        Later positions of a row follow its own. Raises UsageError where rows must be equal.
        """
        raise UsageError(
            "the cache of this architecture has rows of one length alone; generate one text at a "
            "time, or give it the method `cut`"
        )

    def select(self, rows_N: Tensor) -> None:
        """Keep the rows with these numbers, in this order; one may be there several times."""
        raise UsageError(
            "the cache of this architecture selects no rows; generate one text at a time, or give "
            "it the method `select`"
        )


class PartModule(nn.Module):
    """The whole model, or a part of it: the base of each architecture's module."""

    initial_deviation: ClassVar[float] = 0.02
    """GPT-2's: weights are drawn from a normal distribution of this deviation."""
    keeps_outputs: ClassVar[bool] = False
    """Whether a pass sets `kept`."""

    def __init__(self, spec: ModelSpec, part: Part | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.part = part or spec.whole
        self.begins, self.ends = spec.begins(self.part), spec.ends(self.part)
        self.recompute: Recompute = "none"
        self.pieces: dict[str, WeightPiece] = {}
        """The weights that are parts of whole ones, by their names in the whole model."""
        self.deviations: dict[str, float] = {}
        """Of the initial values of weights that were added to those of the architecture."""
        self.kept: dict[int, Tensor | None] = {}
        """The outputs (B, T, C) of the last pass by block, of the blocks that are keys."""

    def forward_part(self, fields: Fields, streams: Streams) -> PartOutput:
        """Compute this part on one microbatch; `streams` is empty where it begins the model."""
        raise NotImplementedError

    def numbered_blocks(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield the blocks of this part, each with its number in the whole model; none by default.

        A pass calls them in this order. Weights of a block are read while it computes, alone.
        """
        yield from ()

    def compiled_layers(self) -> list[nn.Module]:
        """Return the layers that torch.compile may compile, all with one graph; none by default."""
        return []

    def layer_arguments(self, rows: int) -> tuple[Any, ...]:
        """Return what a compiled layer is called with in training, for `rows` sequences."""
        raise NotImplementedError

    def set_recompute(self, recompute: Recompute) -> None:
        """Select what backward passes compute again: of the values in `spec.recomputes` alone."""
        self.recompute = recompute

    def make_cache(self, batch: int) -> GenerationCache:
        """Make an empty cache for `batch` sequences. Raises UsageError where the architecture does
        not generate.
        """
        raise UsageError(
            f"a model of the architecture {self.spec.architecture!r} does not continue text; "
            "generate with a decoder"
        )

    def encode_source(self, fields: Fields) -> GenerationCache:
        """Encode the sources in `fields`, and make the cache of what is generated from them.

        Raises UsageError where the architecture reads no source.
        """
        raise UsageError(
            f"a model of the architecture {self.spec.architecture!r} reads no source; "
            "generate with an encoder-decoder"
        )

    def hidden_states(self, fields: Fields) -> Tensor:
        """Return the hidden states (B, T, C) of a whole model ahead of its head.

        Raises UsageError where the architecture gives none.
        """
        raise UsageError(
            f"a model of the architecture {self.spec.architecture!r} embeds no text; "
            "take an encoder"
        )

    def next_logits(self, ids_BT: Tensor, cache: GenerationCache) -> Tensor:
        """Return the logits (B, T, V) of the positions after those in `cache`, which grows by T."""
        raise NotImplementedError

    def last_logits(self, ids_BT: Tensor, lengths_B: Tensor, cache: GenerationCache) -> Tensor:
        """Return the logits (B, V) of the last position of each row, as `next_logits`.

        A row has `lengths_B` of the T positions; the others are padding, which the cache forgets.
        """
        logits_BTV = self.next_logits(ids_BT, cache)
        if int(lengths_B.min()) < ids_BT.shape[1]:
            cache.cut(lengths_B)
        return last_of(logits_BTV, lengths_B)

    def deviation_of(self, name: str) -> float:
        """Return the standard deviation of the initial values of the weight `name`."""
        return self.initial_deviation

    def fill_of(self, name: str) -> float:
        """Return the initial value of the one-dimensional weight `name`."""
        return 1.0

    def tie(self) -> None:
        """Make tied weights one Parameter, where this part holds both."""
        held = dict(self.named_parameters(remove_duplicate=False))
        for follower, leader in self.spec.tied_weights.items():
            if follower in held:
                # Without the leader the first of its followers takes its place.
                self.set_weight(follower, held.setdefault(leader, held[follower]))

    def set_weight(self, name: str, weight: nn.Parameter) -> None:
        """Replace the Parameter `name` of this part by `weight`."""
        module, _, attribute = name.rpartition(".")
        setattr(self.get_submodule(module), attribute, weight)

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weights by their names in the whole model.

        A tied weight has the name of the leader, which is saved.
        """
        for name, weight in self.named_parameters():
            yield self.spec.tied_weights.get(name, name), weight


def last_of(x_BTC: Tensor, lengths_B: Tensor) -> Tensor:
    """Return the last of the first `lengths_B` positions of each row, (B, C)."""
    return x_BTC[torch.arange(len(x_BTC), device=x_BTC.device), lengths_B - 1]


@torch.no_grad()
def initialise(
    model: PartModule, seed: int, weights: Iterable[tuple[str, nn.Parameter]] | None = None
) -> None:
    """Set each weight to its initial values; `weights`: those of `named_weights` alone."""
    for name, weight in model.named_weights() if weights is None else weights:
        weight.copy_(initial_values(model, name, tuple(weight.shape), seed))


def initial_values(model: PartModule, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return the initial values of the weight `name`, float32 on the CPU.

    They are a pure function of (seed, name, shape): the same on any rank, device and layout. Those
    of a piece are its part of the whole weight's.
    """
    if name.endswith("bias"):
        return torch.zeros(shape, device="cpu")
    if len(shape) == 1:
        return torch.full(shape, model.fill_of(name), device="cpu")
    # A key of its own a weight: no weight depends on the others, so any part can be made alone. A
    # generator's seed is signed, hence 63 bits.
    key = xxhash.xxh3_64_intdigest(name.encode(), seed=seed) >> 1
    generator = torch.Generator().manual_seed(key)
    # Drawn on the CPU: a GPU's generator gives other numbers.
    whole, place = model.pieces.get(name) or WeightPiece(shape, ())
    values = torch.empty(whole, dtype=torch.float32, device="cpu")
    deviation = model.deviations.get(name)
    if deviation is None:
        deviation = model.deviation_of(name)
    values.normal_(0.0, deviation, generator=generator)
    return values[place].contiguous()


class WithoutValues(TorchFunctionMode):
    """Build modules with memory but without initial values.

    `initialise` or a checkpoint sets them all once. The meta device would allocate no memory, and
    it imports torch's compiler, which takes as long as importing torch itself.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", "") == nn.init.__name__:
            return None
        return func(*args, **(kwargs or {}))


def create(
    spec: ModelSpec, seed: int, device: torch.device | None = None, part: Part | None = None
) -> PartModule:
    """Build and initialise the model, or the `part` of it, on `device` (None: the CPU)."""
    model = build_without_values(spec, device, part)
    initialise(model, seed)
    return model


def build_without_values(
    spec: ModelSpec, device: torch.device | None = None, part: Part | None = None
) -> PartModule:
    """Build the model, or the `part` of it, whose weights have memory that is not touched yet."""
    place = device or torch.device("cpu")
    with place, WithoutValues():
        model = spec.build(part)
    # An architecture may compute buffers on the CPU. Before torch 2.8 its get_default_device does
    # not know the device of a `with`, either.
    return model.to(place)


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype (`float32`) and the shape of each weight of the whole model, by its name.

    One block is built at a time, without values: a large model needs little memory.
    """
    shapes = {}
    for block in range(spec.blocks):
        with WithoutValues():
            part = spec.build(Part(block, block + 1))
        for name, weight in part.named_weights():
            shapes[name] = (str(weight.dtype).removeprefix("torch."), tuple(weight.shape))
    return shapes


@contextmanager
def torch_explained() -> Iterator[None]:
    """Run the block; raise MemoryError and DataError where torch means them."""
    try:
        yield
    except (RuntimeError, IndexError) as failure:
        text = str(failure)
        if NO_MEMORY.search(text):
            raise MemoryError(_memory_text(text)) from failure
        if _NO_SUCH_ID.search(text):
            raise DataError(
                "a token id is not in the model's vocabulary: a shard is damaged; "
                "find it with `mpillm prepare --verify`, or prepare the dataset again"
            ) from failure
        raise


def _memory_text(text: str) -> str:
    """Say how much memory torch asked for, and of a GPU how much there is, from its message."""
    asked, gpu = _ASKED.search(text), _OF_GPU.search(text)
    wanted = f"torch asked for {asked[1]}" if asked else "torch asked for more than is free"
    return wanted + (f", and {gpu[3]} of the {gpu[2]} of {gpu[1]} are free" if gpu else "")
