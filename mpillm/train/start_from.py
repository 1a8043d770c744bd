"""Begin a run with the weights of a trained or a published model (`train.start_from`)."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import MismatchError
from mpillm.infer.loading import TOKENIZER
from mpillm.infer.model_source import BASE, ModelSource, describe_base, open_model
from mpillm.models.layers.quantized import rounded
from mpillm.models.spec import ModelSpec
from mpillm.models.tuning import ALL_WEIGHTS, INFIX, Tuning, layer_of
from mpillm.parallel.data.frozen_weights import FrozenWeights
from mpillm.system.console import Console
from mpillm.system.json_text import to_json
from mpillm.system.messages import some_of
from mpillm.system.plain_files import LARGEST_FILE, read_plain
from mpillm.tokens.manifest import Manifest
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.open_source import open_source
from mpillm.weights.slices import Held, TensorSlice, slices_of, whole_box
from mpillm.weights.tensor_source import TensorSource

if TYPE_CHECKING:
    from mpi4py import MPI


def start_from(
    path: Path,
    spec: ModelSpec,
    weights: Mapping[str, Held],
    manifest: Manifest,
    comm: "MPI.Intracomm",
    console: Console,
    frozen: FrozenWeights | None = None,
    tuning: Tuning = ALL_WEIGHTS,
) -> dict[str, Any]:
    """Fill `weights`, a rank's share by our names, and `frozen` from the model at `path`.

    `spec`: of the run's model. Weights of another head keep their initial values, and so do
    adapters. Every rank of `comm` calls it. Returns the fact that names the base of adapters.
    Raises MismatchError where another weight is missing, left over or of another shape. Raises it
    too where the data was made with another tokenizer than the model.
    """
    source = open_source(path, comm, console)
    check_tokenizer("train.start_from", source, manifest, comm)
    opened = open_model(source, comm, console)
    found = opened.with_context(spec)
    alike = not (found.classes and manifest.classes) or found.classes == manifest.classes
    new = spec.new_weights(found.spec, alike)
    held = [*weights, *(frozen.names if frozen else ())]
    names = list(dict.fromkeys(name for part in comm.allgather(held) for name in part))
    wanted = [name for name in names if not (name.startswith(new) or layer_of(name))]
    _check_names(path, wanted, [name for name in found.shapes if not name.startswith(new)])
    initialised = [name for name in names if name.startswith(new) and not layer_of(name)]
    if still := [name for name in initialised if tuning.is_frozen(name)]:
        raise MismatchError(
            f"train.start_from: {path} has no {still[0]} that fits this model, and it is frozen: "
            f"train it, by adapter.also = {to_json(still)} or another train.freeze"
        )
    own = {name: weights[name] for name in wanted if name in weights}
    on_all(comm, lambda: _fill(path, found, own))
    on_all(comm, lambda: _begin_magnitudes(found, weights, tuning))
    if frozen is not None:
        fill_frozen(path, found, frozen, comm)
    console.say(f"starting from the weights of {source.path}")
    if initialised:
        console.say(f"new: {', '.join(initialised)} (initialised)")
    return describe_base(source.path, opened, comm) if tuning.adapter.used else {}


def check_tokenizer(
    setting: str, source: TensorSource, manifest: Manifest, comm: "MPI.Intracomm"
) -> None:
    """Raise MismatchError where the data was made with another tokenizer than the model that
    `setting` names. Every rank of `comm` calls it.
    """
    theirs = on_root(comm, lambda: _tokenizer_hash(source))
    if theirs and theirs != manifest.tokenizer.get("sha256"):
        raise MismatchError(
            f"{setting}: the data {manifest.folder} was made with another tokenizer than "
            f"{source.path}; prepare it with the model's: --tokenizer {source.path}"
        )


def restore_base(
    path: Path,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    frozen: FrozenWeights,
    comm: "MPI.Intracomm",
    console: Console,
) -> dict[str, Any]:
    """Fill the frozen weights of a run of adapters that continues; return the fact of the base.

    Every rank calls it. Raises MismatchError where the model at `path` is another one than the run
    began with.
    """
    source = open_source(path, comm, console)
    found = open_model(source, comm, console)
    fact, known = describe_base(source.path, found, comm), checkpoint.facts.get(BASE)
    if not isinstance(known, dict) or known.get("digest") != fact["digest"]:
        raise MismatchError(
            f"train.start_from: {path} is another model than the base that the adapters of "
            f"{checkpoint.folder} were trained on: its weights have another digest; name that one"
        )
    fill_frozen(path, found.with_context(spec), frozen, comm)
    return fact


def fill_frozen(
    path: Path, source: ModelSource, frozen: FrozenWeights, comm: "MPI.Intracomm"
) -> None:
    """Fill the frozen weights from a model. Every rank of `comm` calls it."""

    def fill() -> None:
        for name, shape in frozen.shapes.items() if frozen.fills else ():
            _check_shape(path, name, source, shape)
            frozen.fill(name, source.read(name))

    on_all(comm, fill)


def _begin_magnitudes(source: ModelSource, weights: Mapping[str, Held], tuning: Tuning) -> None:
    """Set DoRA's magnitudes to the lengths of the base's rows."""
    for name, held in weights.items():
        if name.endswith(f"{INFIX}magnitude"):
            values_OI = rounded(source.read(f"{layer_of(name)}.weight"), tuning.adapter.base)
            _copy(values_OI.norm(dim=1), slices_of(held))


def _check_names(path: Path, wanted: list[str], given: list[str]) -> None:
    """Raise MismatchError unless the model has all weights of the run's, and no others."""
    for what, names in (
        ("lacks {} weights of the model", set(wanted).difference(given)),
        ("has {} weights that the model lacks", set(given).difference(wanted)),
    ):
        if names:
            ordered = [name for name in (*wanted, *given) if name in names]
            raise MismatchError(
                f"train.start_from: {path} {what.format(len(names))}: {some_of(ordered)}; "
                f"leave [model] out to take the settings of {path}"
            )


def _fill(path: Path, source: ModelSource, weights: Mapping[str, Held]) -> None:
    for name, held in weights.items():
        parts = slices_of(held)
        for part in parts:
            _check_shape(path, name, source, part.shape)
        _copy(source.read(name), parts)


def _check_shape(path: Path, name: str, source: ModelSource, shape: tuple[int, ...]) -> None:
    found = source.shapes[name]
    if found != shape:
        raise MismatchError(
            f"train.start_from: {name} of {path} has the shape {list(found)}, and the model's is "
            f"{list(shape)}; leave [model] out to take the settings of {path}"
        )


@torch.no_grad()
def _copy(whole: Tensor, parts: Sequence[TensorSlice]) -> None:
    for part in parts:
        part.tensor.copy_(whole[part.box.within(whole_box(part.shape))])


def _tokenizer_hash(source: TensorSource) -> str:
    """Return the sha256 of the model's tokenizer; "" where it has none."""
    known: Any = source.facts.get("tokenizer")
    if isinstance(source, CheckpointSource):
        return str(known.get("sha256", "")) if isinstance(known, dict) else ""
    try:
        return hashlib.sha256(read_plain(source.path / TOKENIZER, most=LARGEST_FILE)).hexdigest()
    except OSError:
        return ""
