"""A published model at rest: our settings, and each of our weights from its own files.

A family (models/families) gives the place of each weight. Weights are read one by one, so a rank
holds no more of the model than it keeps.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mpillm.errors import CheckpointError, RecipeError
from mpillm.models.families.family import Family, Place
from mpillm.models.families.family_catalog import find_family
from mpillm.models.spec import ModelSpec
from mpillm.system.messages import some_of
from mpillm.weights.slices import Box
from mpillm.weights.tensor_source import TensorSource


@dataclass(frozen=True)
class PublishedModel:
    """The weights of `source` as those of `spec`."""

    source: TensorSource
    family: Family
    spec: ModelSpec

    @classmethod
    def open(cls, source: TensorSource) -> "PublishedModel":
        """Find the family by the source's configuration, and compare all names and shapes.

        Reads no values. Raises CheckpointError with the first names that are missing, unknown or of
        another shape.
        """
        try:
            family = find_family(source.facts)
            spec = family.spec(source.facts)
        except RecipeError as failure:
            raise CheckpointError(f"{source.path}: {failure}") from failure
        model = cls(source, family, spec)
        model._check_names()
        return model

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes in order, or their numbers; none without a head of classes."""
        return self.family.class_names(self.source.facts)

    @cached_property
    def _places(self) -> Mapping[str, Place]:
        return self.family.places(self.spec)

    def read(self, name: str) -> Tensor:
        """Return the weight of ours `name` (`layers.0.attention.query.weight`), as it is stored.

        Raises CheckpointError where it cannot be read, and where a second name of a tied tensor has
        other values.
        """
        place = self._places[name]
        box = None if place.box is None else Box(*place.box)
        values = self.source.read(self._stored(place.name), box)
        for alias in self._second_names.get(place.name, ()):
            if not torch.equal(self.source.read(alias, box), values):
                raise CheckpointError(
                    f"{self.source.path} has {alias} and {place.name}, which its config.json ties, "
                    "with other values; set tie_word_embeddings to false in its config.json"
                )
        values = values[0] if place.squeezed else values
        return values.t().contiguous() if place.transposed else values

    @cached_property
    def _second_names(self) -> Mapping[str, list[str]]:
        """The second names of tied tensors that the files have, by the first ones."""
        found = defaultdict[str, list[str]](list)
        for alias, name in self.family.aliases(self.spec).items():
            if alias in self.source.tensors:
                found[name].append(alias)
        return found

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of our weights."""
        theirs_of, found = self.family.tensors(self.spec), {}
        for name, place in self._places.items():
            shape = theirs_of[place.name] if place.box is None else place.box[1]
            shape = shape[1:] if place.squeezed else shape
            found[name] = shape[::-1] if place.transposed else shape
        return found

    @property
    def dtype(self) -> str:
        """The dtype of most elements."""
        counts: dict[str, int] = {}
        for info in self.source.tensors.values():
            counts[info.dtype] = counts.get(info.dtype, 0) + info.nbytes
        return max(counts, key=lambda dtype: counts[dtype])

    def _stored(self, name: str) -> str:
        """Return the name in the files: those of a model without its head lack the prefix."""
        known = (each for each in self.family.spellings(name) if each in self.source.tensors)
        return next(known, name)

    def _check_names(self) -> None:
        tensors, wanted = self.source.tensors, self.family.tensors(self.spec)
        found = {self._stored(name): (name, shape) for name, shape in wanted.items()}
        missing = [name for name in found if name not in tensors]
        aliases = self.family.aliases(self.spec)
        known = {*found, *aliases, *map(self._stored, aliases)}
        extra = [
            name for name in tensors if name not in known and not name.endswith(self.family.ignored)
        ]
        for what, names in (("lacks", missing), ("has, unknown to its family,", extra)):
            if names:
                raise CheckpointError(
                    f"{self.source.path} {what} {len(names)} tensors of a "
                    f"{self.family.model_types[0]} model: {some_of(names)}; download it again, or "
                    "check model_type in its config.json"
                )
        for stored, (name, shape) in found.items():
            if tensors[stored].shape != shape:
                raise CheckpointError(
                    f"{self.source.path} has {name} of shape {list(tensors[stored].shape)}, and "
                    f"its config.json means {list(shape)}; download it again"
                )


def their_tensors(
    family: Family, spec: ModelSpec, ours: Callable[[str], Tensor]
) -> Callable[[str], Tensor]:
    """Return the function that makes a tensor of theirs, by its name, from our weights.

    `ours(name)` reads one of them.
    """
    shapes, parts = family.tensors(spec), defaultdict[str, list[tuple[str, Place]]](list)
    for own, place in family.places(spec).items():
        parts[place.name].append((own, place))

    def make(name: str) -> Tensor:
        whole: Tensor | None = None
        for own, place in parts[name]:
            values = ours(own).t() if place.transposed else ours(own)
            if place.box is None:
                return values.contiguous()
            if whole is None:
                whole = torch.empty(shapes[name], dtype=values.dtype)
            cuts = tuple(slice(a, a + n) for a, n in zip(*place.box, strict=True))
            whole[cuts] = values.reshape(whole[cuts].shape)
        assert whole is not None
        return whole

    return make
