"""The base of all families: from a Hugging Face `config.json` to settings, and from name to name.

A family is one file. It needs no torch, so that a login node can read and plan a published model.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from mpillm.errors import RecipeError
from mpillm.models.block_settings import BlockSettings
from mpillm.models.decoder import DecoderConfig
from mpillm.models.decoder_weights import decoder_weights
from mpillm.models.families.hub_config import HubConfig
from mpillm.models.spec import ModelSpec

Cut = tuple[tuple[int, ...], tuple[int, ...]]
"""Elements of a tensor: the start and the size along each dim."""
# Settings of training alone: no `config.json` of a family without dropout has a place for them.
OF_TRAINING = ("balance_loss", "dropout", "attention_dropout", "embedding_dropout", "head_dropout")


@dataclass(frozen=True)
class Place:
    """Where one of our weights is in the files of a family."""

    name: str
    """Of their tensor."""
    box: Cut | None = None
    """The elements in the coordinates of their file; None: all."""
    transposed: bool = False
    """Whether their (in, out) is our (out, in)."""
    squeezed: bool = False
    """Whether the box has a first dim of 1 that ours lacks."""


class Family(ABC):
    """A family of published models: how it names its settings and its weights."""

    model_types: ClassVar[tuple[str, ...]]
    """The values of `model_type` in its `config.json`."""
    stack: ClassVar[str]
    """Our architecture that it is of."""
    prefix: ClassVar[str] = "model."
    """Ahead of the names of all tensors but the head's. Files of a bare model lack it."""
    ignored: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)
    """Ends of the names of tensors without weights, which old files have."""

    @abstractmethod
    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """Return the settings of ours that a `config.json` means, of transformers 4 or 5.

        Raises RecipeError with the key, the value and what is supported.
        """

    @abstractmethod
    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """Return the `config.json` of `spec`, which transformers loads without code of ours.

        Raises RecipeError where the family cannot be so.
        """

    @abstractmethod
    def places(self, spec: ModelSpec) -> Mapping[str, Place]:
        """Return the place of each weight, by our name in the whole model; tied weights once."""

    @abstractmethod
    def tensors(self, spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of each of their tensors, by their name."""

    @abstractmethod
    def aliases(self, spec: ModelSpec) -> Mapping[str, str]:
        """Return their second names of tied tensors: a file may have both, of equal values."""

    def class_names(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the classes in order, their numbers without names; none of another
        model. Raises RecipeError as `spec` does.
        """
        return ()

    def spellings(self, name: str) -> tuple[str, ...]:
        """Return the names that files have for their tensor `name`, the usual one first."""
        return name, name.removeprefix(self.prefix)


class TableFamily(Family):
    """A family that tables describe: of settings' defaults, and of names."""

    defaults: ClassVar[Mapping[str, Any]]
    """Of the keys that a `config.json` may leave out."""
    names: ClassVar[Mapping[str, str]]
    """Our names → theirs: of weights at the ends, and of a block's modules after `block`."""
    block: ClassVar[str] = "model.layers."
    """Ahead of the number of a block."""

    @abstractmethod
    def read(self, hub: HubConfig) -> ModelSpec:
        """Return the settings that `hub` means. Raises RecipeError."""

    @abstractmethod
    def written(self, spec: ModelSpec) -> dict[str, Any]:
        """Return the keys of `config.json` that say what `spec`, of this stack, is."""

    @abstractmethod
    def shapes(self, spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of each of our weights by its name; a tied one once."""

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        return self.read(HubConfig(config, self.defaults))

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        if spec.architecture != self.stack:
            raise RecipeError(
                f"a model of the architecture {spec.architecture} is none of the family "
                f"{self.model_types[0]}, which is of {self.stack}"
            )
        found = {"model_type": self.model_types[0], **self.written(spec)}
        # Read back: what the family has no key for is then another value.
        other, wanted = self.spec(found), spec
        assert isinstance(other, BlockSettings)
        assert isinstance(wanted, BlockSettings)
        other, wanted = other.resolved(), wanted.resolved()
        for name in (field.name for field in fields(wanted)):
            theirs, ours = getattr(other, name), getattr(wanted, name)
            # A family without dropout is another way to train the same model.
            if theirs != ours and name not in OF_TRAINING:
                raise RecipeError(
                    f"a model with {name} = {ours!r} is none of the family "
                    f"{self.model_types[0]}, which has {theirs!r} there"
                )
        return found

    def places(self, spec: ModelSpec) -> Mapping[str, Place]:
        return {name: self.place(spec, name) for name in self.shapes(spec)}

    def place(self, spec: ModelSpec, name: str) -> Place:
        """Return the place of our weight `name`."""
        return Place(self.renamed(name))

    def renamed(self, name: str) -> str:
        """Return their name of our weight `name`."""
        if name in self.names:
            return self.names[name]
        number, _, within = name.removeprefix("layers.").partition(".")
        module, _, kind = within.rpartition(".")
        return f"{self.block}{number}.{self.names[module]}.{kind}"

    def tensors(self, spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
        shapes = self.shapes(spec)
        found: dict[str, tuple[int, ...]] = {}
        for name, place in self.places(spec).items():
            shape = shapes[name][::-1] if place.transposed else shapes[name]
            if place.box is not None:
                # A tensor of theirs that holds several of ours ends where the last one does.
                ends = tuple(map(sum, zip(*place.box, strict=True)))
                shape = tuple(map(max, found.get(place.name, ends), ends))
            found[place.name] = shape
        return found

    def aliases(self, spec: ModelSpec) -> Mapping[str, str]:
        return {
            self.place(spec, follower).name: self.place(spec, leader).name
            for follower, leader in spec.tied_weights.items()
        }


class DecoderFamily(TableFamily):
    """A family of decoders."""

    stack = "decoder"
    architecture: ClassVar[str]
    """The name of transformers' class of a causal language model."""

    @abstractmethod
    def settings(self, hub: HubConfig) -> dict[str, Any]:
        """Return the arguments of DecoderConfig that `hub` means. Raises RecipeError."""

    @abstractmethod
    def keys(self, spec: DecoderConfig) -> dict[str, Any]:
        """Return the keys of `config.json` that say what `spec` is."""

    def read(self, hub: HubConfig) -> DecoderConfig:
        return DecoderConfig(**self.settings(hub))

    def written(self, spec: ModelSpec) -> dict[str, Any]:
        assert isinstance(spec, DecoderConfig)
        return {"architectures": [self.architecture], **self.keys(spec)}

    def shapes(self, spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
        assert isinstance(spec, DecoderConfig)
        return decoder_weights(spec)
