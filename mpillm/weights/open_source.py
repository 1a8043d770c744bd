"""Open whatever holds tensors under names: a run, a checkpoint, a Hugging Face folder, a file."""

from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_root
from mpillm.errors import CheckpointError
from mpillm.system.console import Console
from mpillm.weights import gguf_source, safetensors_source
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.finding import find
from mpillm.weights.gguf_source import GgufSource
from mpillm.weights.packed.packed_format import read_packed_config
from mpillm.weights.packed.packed_source import PackedSource
from mpillm.weights.places import CHECKPOINTS, INDEX
from mpillm.weights.safetensors_source import (
    SafetensorsSource,
    is_folder_of_safetensors,
    refuse_pickles,
)
from mpillm.weights.tensor_source import TensorSource

if TYPE_CHECKING:
    from mpi4py import MPI


def open_source(path: Path, comm: "MPI.Intracomm", console: Console) -> TensorSource:
    """Open the tensors at `path`; of a run, those of its newest whole checkpoint.

    Every rank of `comm` calls it. Raises CheckpointError where there are none, with what could be
    there.
    """
    kind = on_root(comm, lambda: _kind(path))
    if kind == CheckpointSource.kind:
        return CheckpointSource(find(path, comm, console))
    if kind == GgufSource.kind:
        return GgufSource(path)
    source = SafetensorsSource(path)
    layout = read_packed_config(source.facts)
    return source if layout is None else PackedSource(source, layout)


def _kind(path: Path) -> str:
    """Return the kind of source that `path` is, by what is there. Raises CheckpointError."""
    if (path / INDEX).exists() or (path / CHECKPOINTS).is_dir():
        return CheckpointSource.kind
    if is_folder_of_safetensors(path) or path.suffix == safetensors_source.SUFFIX:
        return _existing(path, SafetensorsSource.kind)
    if path.suffix == gguf_source.SUFFIX:
        return _existing(path, GgufSource.kind)
    refuse_pickles(path)
    raise CheckpointError(
        f"{path} {'holds no weights' if path.exists() else 'does not exist'}; name a run's folder, "
        "a checkpoint (…/step-00001000), a Hugging Face folder with model.safetensors, or a file "
        "*.safetensors or *.gguf"
    )


def _existing(path: Path, kind: str) -> str:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; check the name")
    return kind
