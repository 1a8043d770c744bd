"""Begin a run with the weights of a trained or a published model (`train.start_from`)."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import MismatchError
from mpillm.infer.loading import TOKENIZER
from mpillm.models.spec import ModelSpec
from mpillm.system.console import Console
from mpillm.system.messages import command, some_of
from mpillm.system.plain_files import LARGEST_FILE, read_plain
from mpillm.tokens.manifest import Manifest
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.gguf_source import GgufSource
from mpillm.weights.model_settings import model_settings
from mpillm.weights.open_source import open_source
from mpillm.weights.published_model import PublishedModel
from mpillm.weights.slices import Held, slices_of, whole_box
from mpillm.weights.tensor_source import TensorSource

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class _Source:
    """The weights of a model at rest by our names, its settings, and the names of its classes."""

    spec: ModelSpec
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    classes: tuple[str, ...]


def start_from(
    path: Path,
    spec: ModelSpec,
    weights: Mapping[str, Held],
    manifest: Manifest,
    comm: "MPI.Intracomm",
    console: Console,
) -> None:
    """Fill `weights`, a rank's share by our names, from the model at `path`.

    `spec`: of the run's model. Weights of another head keep their initial values. Every rank of
    `comm` calls it. Raises MismatchError where another weight is missing, left over or of another
    shape. Raises it too where the data was made with another tokenizer than the model.
    """
    source = open_source(path, comm, console)
    theirs = on_root(comm, lambda: _tokenizer_hash(source))
    ours = manifest.tokenizer.get("sha256")
    if theirs and theirs != ours:
        raise MismatchError(
            f"train.start_from: the data {manifest.folder} was made with another tokenizer than "
            f"{path}; prepare it with the model's: --tokenizer {source.path}"
        )
    found = on_all(comm, lambda: _open(source))
    alike = not (found.classes and manifest.classes) or found.classes == manifest.classes
    own = spec.new_weights(found.spec, alike)
    names = list(dict.fromkeys(name for part in comm.allgather([*weights]) for name in part))
    wanted = [name for name in names if not name.startswith(own)]
    _check_names(path, wanted, [name for name in found.shapes if not name.startswith(own)])
    on_all(comm, lambda: _fill(path, found, {n: weights[n] for n in wanted if n in weights}))
    console.say(f"starting from the weights of {source.path}")
    if new := [name for name in names if name.startswith(own)]:
        console.say(f"new: {', '.join(new)} (initialised)")


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


def _fill(path: Path, source: _Source, weights: Mapping[str, Held]) -> None:
    for name, held in weights.items():
        shape, parts = source.shapes[name], slices_of(held)
        if any(shape != part.shape for part in parts):
            raise MismatchError(
                f"train.start_from: {name} of {path} has the shape {list(shape)}, and the "
                f"model's is {list(parts[0].shape)}; leave [model] out to take the settings of "
                f"{path}"
            )
        whole = source.read(name)
        with torch.no_grad():
            for part in parts:
                part.tensor.copy_(whole[part.box.within(whole_box(shape))])


def _open(source: TensorSource) -> _Source:
    if isinstance(source, CheckpointSource):
        classes = tuple(source.facts.get("classes", ()))
        spec = model_settings(source.path)
        return _Source(spec, source.weights, source.read_weight, classes)
    if isinstance(source, GgufSource):
        raise MismatchError(
            f"train.start_from: {source.path} is a GGUF file; make a checkpoint of it first "
            f"({command(['mpillm', 'import', source.path, '--out', 'FOLDER'])}), and start from it"
        )
    model = PublishedModel.open(source)
    return _Source(model.spec, model.shapes, model.read, model.classes)


def _tokenizer_hash(source: TensorSource) -> str:
    """Return the sha256 of the model's tokenizer; "" where it has none."""
    known: Any = source.facts.get("tokenizer")
    if isinstance(source, CheckpointSource):
        return str(known.get("sha256", "")) if isinstance(known, dict) else ""
    try:
        return hashlib.sha256(read_plain(source.path / TOKENIZER, most=LARGEST_FILE)).hexdigest()
    except OSError:
        return ""
