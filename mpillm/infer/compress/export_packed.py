"""Give the tensors of a compressed model as compressed-tensors names them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mpillm.errors import MismatchError, UsageError
from mpillm.models.families.family import Family
from mpillm.models.layers.stored.stored_codes import StoredCodes, stored_format
from mpillm.models.spec import ModelSpec
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.names import stored_name, weight_name
from mpillm.weights.packed.packed_format import CONFIG_KEY, packed_config, packed_tensors
from mpillm.weights.published_model import their_tensors

HEADS = ("lm_head", "embed_out", "score", "classifier")
"""Linear layers outside of blocks, by the names of families."""


@dataclass(frozen=True)
class PackedPlan:
    """What is written: the shape and the bytes of each tensor, and how it is made."""

    shapes: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    make: Callable[[str], Tensor]
    config: Mapping[str, Any]
    """What `config.json` has in addition."""

    @classmethod
    def of(cls, source: CheckpointSource, family: Family, spec: ModelSpec) -> "PackedPlan":
        """Plan the tensors. Raises UsageError and MismatchError where they are not packed so."""
        layout = stored_format(source.facts)
        if layout is None:
            raise UsageError(
                f"{source.path} has no stored layers; make some by `mpillm compress`, or take "
                "--to hf"
            )
        packed = _layers(source, family, spec)
        kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, shape in family.tensors(spec).items():
            if name in packed:
                layer = name.removesuffix(".weight")
                for own, tensor in packed_tensors(layer, _empty(source, packed[name])).items():
                    kinds[own] = tuple(tensor.shape), tensor.dtype
            else:
                kinds[name] = shape, torch.bfloat16
        plain = their_tensors(family, spec, lambda name: source.read_weight(name).bfloat16())

        @lru_cache(maxsize=1)
        def tensors_of(layer: str) -> dict[str, Tensor]:
            stored = source.read_codes(packed[f"{layer}.weight"])
            assert stored is not None
            return packed_tensors(layer, stored)

        def make(name: str) -> Tensor:
            layer = name.rpartition(".")[0]
            return tensors_of(layer)[name] if f"{layer}.weight" in packed else plain(name)

        sizes = {
            name: torch.Size(shape).numel() * kind.itemsize for name, (shape, kind) in kinds.items()
        }
        shapes = {name: shape for name, (shape, _) in kinds.items()}
        return cls(shapes, sizes, make, {CONFIG_KEY: packed_config(layout, list(HEADS))})


def _layers(source: CheckpointSource, family: Family, spec: ModelSpec) -> dict[str, str]:
    """Return the packed layers: their name of the weight → ours."""
    found = {}
    for ours, place in family.places(spec).items():
        if weight_name(ours) in source.tensors:
            continue
        layout = source.tensors[stored_name(ours, "codes")].dtype
        if layout == "int8" and not ours.startswith("layers."):
            # Embeddings and heads are written as plain values.
            continue
        if place.box is not None or place.transposed or place.squeezed:
            raise MismatchError(
                f"the family {family.model_types[0]} has {ours} in a part of {place.name}, which "
                "is not packed; take --to hf, or --to gguf"
            )
        found[place.name] = ours
    return found


def _empty(source: CheckpointSource, ours: str) -> StoredCodes:
    """Return a stored weight without values, for the shapes."""
    layout = stored_format(source.facts)
    assert layout is not None
    shape = source.weights[ours]
    return StoredCodes(
        layout,
        {
            part: torch.zeros(size, dtype=getattr(torch, dtype))
            for part, (dtype, size) in layout.tensors_of(shape).items()
        },
    )
