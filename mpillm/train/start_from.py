"""Begin a run with the weights of a trained or a published model (`train.start_from`)."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import MismatchError
from mpillm.infer.loading import TOKENIZER
from mpillm.system.console import Console
from mpillm.system.messages import command, some_of
from mpillm.system.plain_files import LARGEST_FILE, read_plain
from mpillm.tokens.manifest import Manifest
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.gguf_source import GgufSource
from mpillm.weights.open_source import open_source
from mpillm.weights.published_model import PublishedModel
from mpillm.weights.tensor_source import TensorSource

if TYPE_CHECKING:
    from mpi4py import MPI


def start_from(
    path: Path,
    weights: Mapping[str, Tensor],
    manifest: Manifest,
    comm: "MPI.Intracomm",
    console: Console,
) -> None:
    """Fill `weights`, a rank's share by our names, from the model at `path`.

    Every rank of `comm` calls it. Raises MismatchError where a weight is missing or has another
    shape, and where the data was made with another tokenizer than the model.
    """
    source = open_source(path, comm, console)
    theirs = on_root(comm, lambda: _tokenizer_hash(source))
    ours = manifest.tokenizer.get("sha256")
    if theirs and theirs != ours:
        raise MismatchError(
            f"train.start_from: the data {manifest.folder} was made with another tokenizer than "
            f"{path}; prepare it with the model's: --tokenizer {source.path}"
        )
    read, shapes = _reader(source, comm)
    on_all(comm, lambda: _fill(path, read, shapes, weights))
    console.say(f"starting from the weights of {source.path}")


def _fill(
    path: Path,
    read: Callable[[str], Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, Tensor],
) -> None:
    missing = [name for name in weights if name not in shapes]
    if missing:
        raise MismatchError(
            f"train.start_from: {path} lacks {len(missing)} weights of the model: "
            f"{some_of(missing)}; leave [model] out to take the settings of {path}"
        )
    for name, weight in weights.items():
        if shapes[name] != tuple(weight.shape):
            raise MismatchError(
                f"train.start_from: {name} of {path} has the shape {list(shapes[name])}, and the "
                f"model's is {list(weight.shape)}; leave [model] out to take the settings of {path}"
            )
        with torch.no_grad():
            weight.copy_(read(name))


def _reader(
    source: TensorSource, comm: "MPI.Intracomm"
) -> tuple[Callable[[str], Tensor], Mapping[str, tuple[int, ...]]]:
    """Return the function that reads one of our weights, and the shapes of all."""
    if isinstance(source, CheckpointSource):
        return source.read_weight, source.weights
    if isinstance(source, GgufSource):
        raise MismatchError(
            f"train.start_from: {source.path} is a GGUF file; make a checkpoint of it first "
            f"({command(['mpillm', 'import', source.path, '--out', 'FOLDER'])}), and start from it"
        )
    model = on_all(comm, lambda: PublishedModel.open(source))
    return model.read, model.shapes


def _tokenizer_hash(source: TensorSource) -> str:
    """Return the sha256 of the model's tokenizer; "" where it has none."""
    known: Any = source.facts.get("tokenizer")
    if isinstance(source, CheckpointSource):
        return str(known.get("sha256", "")) if isinstance(known, dict) else ""
    try:
        return hashlib.sha256(read_plain(source.path / TOKENIZER, most=LARGEST_FILE)).hexdigest()
    except OSError:
        return ""
