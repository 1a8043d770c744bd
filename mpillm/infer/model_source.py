"""A model at rest by our names: of a run, of a published model, or of adapters and their base."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from torch import Tensor

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import CheckpointError, MismatchError
from mpillm.models.adapt import tuned_shapes
from mpillm.models.layers.adapted_linear import merged
from mpillm.models.layers.quantized import rounded
from mpillm.models.spec import ModelSpec
from mpillm.models.tuning import INFIX, AdapterSettings, Tuning, layer_of, read_adapter
from mpillm.runs.run_files import folder_of_paths
from mpillm.system.console import Console
from mpillm.system.messages import command
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.gguf_source import GgufSource
from mpillm.weights.model_settings import model_settings
from mpillm.weights.open_source import open_source
from mpillm.weights.published_model import PublishedModel
from mpillm.weights.slices import raw
from mpillm.weights.tensor_source import TensorSource

if TYPE_CHECKING:
    from mpi4py import MPI

POSITIONS = "position.weight"
"""The name of the learned positions in every architecture that has them, (rows, width)."""
BASE = "base"
"""The fact of a checkpoint of adapters that names its base: `path` and `digest`."""


@dataclass(frozen=True)
class ModelSource:
    """The weights of a model at rest by our names, its settings, and the names of its classes."""

    spec: ModelSpec
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    """Return a weight by its name. Raises CheckpointError."""
    classes: tuple[str, ...]

    def with_context(self, spec: ModelSpec) -> "ModelSource":
        """Return the same model for rows no longer than those of `spec`: of learned positions
        the first ones.
        """
        if POSITIONS not in self.shapes or spec.context >= self.spec.context:
            return self
        rows, width = self.shapes[POSITIONS]
        kept = rows - self.spec.context + spec.context

        def read(name: str) -> Tensor:
            return self.read(name)[:kept] if name == POSITIONS else self.read(name)

        return replace(self, shapes={**self.shapes, POSITIONS: (kept, width)}, read=read)


def open_model(source: TensorSource, comm: "MPI.Intracomm", console: Console) -> ModelSource:
    """Open the model that `source` holds; adapters are merged with their base.

    Every rank of `comm` calls it. Raises CheckpointError and MismatchError.
    """
    if isinstance(source, GgufSource):
        raise MismatchError(
            f"{source.path} is a GGUF file; make a checkpoint of it first "
            f"({command(['mpillm', 'import', source.path, '--out', 'FOLDER'])}), and start from it"
        )
    if not isinstance(source, CheckpointSource):
        model = on_all(comm, lambda: PublishedModel.open(source))
        return ModelSource(model.spec, model.shapes, model.read, model.classes)
    classes = tuple(source.facts.get("classes", ()))
    spec = on_all(comm, lambda: model_settings(source.path))
    adapter = read_adapter(source.facts["recipe"].get("adapter"))
    if not adapter.used:
        return ModelSource(spec, source.weights, source.read_weight, classes)
    base = open_base(source, comm, console)
    return _merged(source, spec, adapter, base, classes)


def open_base(source: CheckpointSource, comm: "MPI.Intracomm", console: Console) -> ModelSource:
    """Open the base of a checkpoint of adapters, and compare its digest. Every rank calls it.

    Raises CheckpointError where it is missing, and MismatchError where another model is there.
    """
    fact = source.facts.get(BASE)
    if not isinstance(fact, dict) or not isinstance(fact.get("path"), str):
        raise CheckpointError(
            f"{source.path} holds adapters and names no base; use another checkpoint"
        )
    path = on_root(comm, lambda: _find(source, fact["path"]))
    base = open_model(open_source(path, comm, console), comm, console)
    if digest_of(base, comm) != fact.get("digest"):
        raise MismatchError(
            f"{path} is another model than the base that the adapters of {source.path} were "
            "trained on: its weights have another digest; put the base back there"
        )
    return base


def _find(source: CheckpointSource, named: str) -> Path:
    """Return where the base is: its path may begin in the folder of the run."""
    near = folder_of_paths(source.path.parent.parent, source.facts["recipe"])
    begun = source.facts.get("folder")
    begins = [*([near] if near else []), *([Path(begun)] if isinstance(begun, str) else []), Path()]
    for begin in begins:
        if (begin / named).exists():
            return begin / named
    raise CheckpointError(
        f"the base {named} of the adapters in {source.path} is not there; put it back, or link it "
        "there"
    )


def _merged(
    source: CheckpointSource,
    spec: ModelSpec,
    adapter: AdapterSettings,
    base: ModelSource,
    classes: tuple[str, ...],
) -> ModelSource:
    """Return the model of a base with merged adapters. Weights that were trained whole take the
    place of the base's.
    """
    base, stored = base.with_context(spec), source.weights
    tuned = tuned_shapes(spec, Tuning(adapter))
    whole = {name: shape for name, shape in stored.items() if not layer_of(name)}
    in_blocks = {f"{layer}.weight" for layer in tuned.layers}

    def read(name: str) -> Tensor:
        if name in whole:
            return source.read_weight(name)
        values = base.read(name).float()
        if name not in in_blocks:
            return values
        layer = name.removesuffix(".weight")
        values = rounded(values, adapter.base)
        if f"{layer}{INFIX}a" not in stored:
            return values
        a_RI, b_OR = (source.read_weight(f"{layer}{INFIX}{own}") for own in ("a", "b"))
        magnitude = f"{layer}{INFIX}magnitude"
        magnitude_O = source.read_weight(magnitude) if magnitude in stored else None
        return merged(values, a_RI, b_OR, adapter.scale, magnitude_O)

    return ModelSource(spec, {**tuned.frozen, **whole}, read, classes)


def digest_of(model: ModelSource, comm: "MPI.Intracomm") -> str:
    """Return the digest (XXH3, 128 bits) of all weights, in float32 and by our names.

    Ranks read a share each: every rank of `comm` calls it. It is the same in any file format.
    """
    names = sorted(model.shapes)

    def own() -> dict[str, str]:
        return {
            name: xxhash.xxh3_128_hexdigest(raw(model.read(name).float().contiguous())[1].data)
            for name in names[comm.rank :: comm.size]
        }

    found: dict[str, str] = {}
    for share in comm.allgather(on_all(comm, own)):
        found |= share
    text = "\n".join(f"{name} {list(model.shapes[name])} {found[name]}" for name in names)
    return xxhash.xxh3_128_hexdigest(text.encode())


def describe_base(path: Path, model: ModelSource, comm: "MPI.Intracomm") -> dict[str, Any]:
    """Return the fact that names a base. Every rank of `comm` calls it."""
    return {"path": str(path), "digest": digest_of(model, comm)}
