"""Checkpoints: one namespace of whole tensors, format `mpillm.checkpoint` version 1.

A checkpoint is a folder `step-00001000/`: an HDF5 file of each rank that wrote (`rank-00000.h5`, …), small text files,
and `index.json`, written last. The index tells for each tensor where its bytes lie and their hash, so a reader needs
the index and `preadv` alone; any HDF5 tool may look too. Tensor names know nothing of ranks: any number of ranks reads
what any number wrote.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mpillm.errors import CheckpointError, MismatchError
from mpillm.system import hdf5
from mpillm.weights.places import INDEX

FORMAT, VERSION = "mpillm.checkpoint", 1
# HDF5 has no bfloat16: it is stored as its two bytes, and the index tells the type.
STORED_AS = {torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class StoredSlice:
    """A run of `count` elements, from element `first` of the row-major tensor on, in `file` at byte `offset`."""

    file: str
    offset: int
    nbytes: int
    first: int
    count: int
    xxh3_128: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the namespace: its torch dtype (`float32`), its whole shape, the pieces that make it up."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[StoredSlice, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        pieces = tuple(StoredSlice(**piece) for piece in value["pieces"])
        return cls(str(value["dtype"]), tuple(value["shape"]), pieces)


def raw(tensor: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """The tensor's memory as a NumPy array: shared on the CPU, so reading into it fills the tensor."""
    tensor = tensor.detach()
    return tensor.view(STORED_AS.get(tensor.dtype, tensor.dtype)).numpy()


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class Checkpoint:
    """An opened checkpoint: its `facts` (step, seed, recipe, …) and its tensors, which are read on demand."""

    def __init__(self, folder: Path) -> None:
        """Read the index and compare the files' sizes with it. Raises CheckpointError naming what is wrong."""
        self.folder = folder
        index = _read_index(folder)
        try:
            self.facts: dict[str, Any] = index["facts"]
            self.tensors = {
                name: StoredTensor.from_json(value) for name, value in index["tensors"].items()
            }
            self._files: dict[str, int] = index["files"]
        except (KeyError, TypeError) as failure:
            raise CheckpointError(
                f"{folder / INDEX} is damaged ({failure}); use another checkpoint"
            ) from failure
        for file, nbytes in self._files.items():
            _check_size(folder / file, nbytes)

    @property
    def step(self) -> int:
        return int(self.facts["step"])

    def text(self, file: str) -> str:
        """The small text file `file` that lies beside the tensors."""
        return (self.folder / file).read_text(encoding="utf-8")

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill CPU tensors (name → tensor) in place; each byte read is checked against its hash.

        Raises MismatchError when a name is missing or its shape or type differs, CheckpointError when bytes are wrong.
        """
        for name, tensor in tensors.items():
            self._check_match(name, tensor)
        with _Files(self.folder) as files:
            for name, tensor in tensors.items():
                flat = raw(tensor).reshape(-1)
                for piece in self.tensors[name].pieces:
                    files.read(name, piece, flat[piece.first : piece.first + piece.count])

    def verify(self) -> None:
        """Read every byte and compare the hashes. Raises CheckpointError."""
        with _Files(self.folder) as files:
            for name, entry in self.tensors.items():
                for piece in entry.pieces:
                    files.read(name, piece, np.empty(piece.nbytes, np.uint8))

    def _check_match(self, name: str, tensor: Tensor) -> None:
        entry = self.tensors.get(name)
        if entry is None:
            raise MismatchError(
                f"the checkpoint {self.folder} holds no tensor {name}; was it written for another model?"
            )
        wanted = (dtype_name(tensor), tuple(tensor.shape))
        if (entry.dtype, entry.shape) != wanted:
            raise MismatchError(
                f"the checkpoint {self.folder} holds {name} as {entry.dtype} {list(entry.shape)}, "
                f"the model wants {wanted[0]} {list(wanted[1])}; use the recipe that it was written with"
            )
        assert raw(tensor).flags.c_contiguous, f"{name} is not contiguous"


class _Files:
    """The data files of a checkpoint, opened as they are needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, name: str, piece: StoredSlice, values: np.ndarray[Any, np.dtype[Any]]) -> None:
        path = self._folder / piece.file
        try:
            if piece.file not in self._open:
                self._open[piece.file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            hdf5.read_at(self._open[piece.file], values, piece.offset)
        except (OSError, EOFError) as failure:
            raise CheckpointError(
                f"cannot read {name} from {path}: {failure}; use another checkpoint"
            ) from failure
        if hdf5.digest(values) != piece.xxh3_128:
            raise CheckpointError(
                f"{name} in {path} is damaged: its hash differs; use another checkpoint"
            )


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as failure:
        raise CheckpointError(
            f"{folder} is no whole checkpoint: it has no {INDEX}; use another"
        ) from failure
    except (OSError, ValueError) as failure:
        raise CheckpointError(
            f"{path} cannot be read: {failure}; use another checkpoint"
        ) from failure
    found = (index.get("format"), index.get("version")) if isinstance(index, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path} is of format {found[0]} version {found[1]}; this mpillm reads {FORMAT} {VERSION}"
        )
    assert isinstance(index, dict)
    return index


def _check_size(path: Path, nbytes: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as failure:
        raise CheckpointError(
            f"{path} cannot be read: {failure.strerror}; use another checkpoint"
        ) from failure
    if found != nbytes:
        raise CheckpointError(
            f"{path} has {found:,} bytes, its index says {nbytes:,}; use another checkpoint"
        )


def index_json(
    facts: Mapping[str, Any], tensors: Mapping[str, StoredTensor], files: Mapping[str, int]
) -> dict[str, Any]:
    """The index as JSON takes it; what `Checkpoint` reads."""
    entries = {name: asdict(entry) for name, entry in sorted(tensors.items())}
    return {
        "format": FORMAT,
        "version": VERSION,
        "facts": dict(facts),
        "files": dict(files),
        "tensors": entries,
    }
