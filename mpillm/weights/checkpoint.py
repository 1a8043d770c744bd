"""Checkpoints: one namespace of whole tensors, format `mpillm.checkpoint` versions 1 and 2.

A checkpoint is a folder `step-00001000/`: an HDF5 file of each rank that wrote
(`rank-00000.h5`, …), small text files, and `index.json`, written last. The index gives the place
and the hash of each stored slice of each tensor. A reader needs the index and `preadv` alone; any
HDF5 tool opens the files. Names of tensors never mention ranks: any number of ranks reads what
any number wrote.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

from mpillm.errors import CheckpointError, MismatchError
from mpillm.system import hdf5
from mpillm.system.messages import explain, why
from mpillm.system.plain_files import LARGEST_FILE, read_plain
from mpillm.weights.host_pieces import host_copy, on_host
from mpillm.weights.index import StoredSlice, read_index
from mpillm.weights.slices import (
    Array,
    Box,
    Held,
    TensorSlice,
    all_finite,
    raw,
    slices_of,
    stored_dtype,
)


class Checkpoint:
    """An opened checkpoint: its `facts` (step, seed, recipe, …) and its tensors, read on demand."""

    def __init__(self, folder: Path) -> None:
        """Read and check the index, and compare the files' sizes with it.

        Raises CheckpointError with the fault.
        """
        self.folder = folder
        # After every byte was verified, a slice that is needed in part is read in part.
        self.verified = False
        index = read_index(folder)
        self.facts: dict[str, Any] = index.facts
        self.tensors = index.tensors
        self.has_digest = index.has_digest
        self._hashes = index.hashes
        for file, nbytes in index.files.items():
            _check_size(folder / file, nbytes)

    @property
    def step(self) -> int:
        return int(self.facts["step"])

    @property
    def texts(self) -> list[str]:
        """The names of the small text files."""
        return list(self._hashes)

    def text(self, file: str) -> str:
        """Read the small text file `file` of the checkpoint and check its hash, where it has one.

        Raises CheckpointError.
        """
        path = self.folder / file
        try:
            contents = read_plain(path, most=LARGEST_FILE)
            if (digest := self._hashes.get(file)) and hdf5.digest(contents) != digest:
                raise CheckpointError(
                    f"{path} is damaged: its hash differs; use another checkpoint"
                )
            return contents.decode("utf-8")
        except OSError as failure:
            raise CheckpointError(explain(failure, path)) from failure
        except UnicodeDecodeError as failure:
            raise CheckpointError(
                f"{path} is damaged: {failure}; use another checkpoint"
            ) from failure

    def load(self, tensors: Mapping[str, Held]) -> None:
        """Fill tensors and slices in place, by name, from whatever slices are stored.

        A stored slice that is read whole is checked against its hash. A slice that is needed in
        part is read in part where the checkpoint is `verified`, else whole. Raises MismatchError
        when a name is missing or its shape or type differs, CheckpointError when bytes are wrong.
        """
        wanted = [(name, part) for name, held in tensors.items() for part in slices_of(held)]
        for name, part in wanted:
            self._check_match(name, part)
        with _Files(self.folder) as files:
            for name, part in wanted:
                # Of a GPU's tensor one copy at a time is on the host.
                values = host_copy(part.tensor.detach())
                array = raw(values)[1]
                pieces = self.tensors[name].pieces
                found = sum(
                    _fill(files, name, piece, array, part.box, self.verified) for piece in pieces
                )
                if found != array.size:
                    raise CheckpointError(
                        f"{self.folder} holds {found:,} of the {array.size:,} elements of {name} "
                        f"from {list(part.start)} on; use another checkpoint"
                    )
                self._check_finite(name, values)
                if not on_host(part.tensor):
                    part.tensor.detach().copy_(values)

    def verify(self) -> None:
        """Read every byte and compare the hashes. Raises CheckpointError."""
        fault = self.first_fault(0, 1)
        if fault:
            raise CheckpointError(fault[1])
        self.verified = True

    def first_fault(self, rank: int, ranks: int) -> tuple[int, str] | None:
        """Verify this rank's share of the stored slices; rank 0 verifies the small texts, too.

        Returns the number of its first damaged slice and the reason, or None. The shares of all
        ranks make up the whole; the lowest number is the fault that one rank alone would find. A
        text has the number -1. A slice that holds NaN or an infinity counts as damaged.
        """
        try:
            for file in self._hashes if rank == 0 else ():
                self.text(file)
        except CheckpointError as failure:
            return -1, str(failure)
        slices = [(name, piece) for name, entry in self.tensors.items() for piece in entry.pieces]
        nbytes = np.array([piece.nbytes for _, piece in slices], np.float64)
        # A slice goes to the rank in whose share its middle is: neighbours stay together.
        middles = np.cumsum(nbytes) - nbytes / 2
        first, last = np.searchsorted(middles, nbytes.sum() * np.array([rank, rank + 1]) / ranks)
        if rank == ranks - 1:
            last = len(slices)
        with _Files(self.folder) as files:
            for number in range(int(first), int(last)):
                name, piece = slices[number]
                count = sum(box.numel for box in piece.boxes)
                values = torch.empty(count, dtype=getattr(torch, self.tensors[name].dtype))
                try:
                    files.read(name, piece, raw(values)[1])
                    self._check_finite(name, values)
                except CheckpointError as failure:
                    return number, str(failure)
        return None

    def _check_finite(self, name: str, values: torch.Tensor) -> None:
        if not all_finite(values):
            raise CheckpointError(
                f"{name} in {self.folder} holds NaN or an infinity: the run had diverged when it "
                "was saved; use an earlier checkpoint"
            )

    def _check_match(self, name: str, part: TensorSlice) -> None:
        entry = self.tensors.get(name)
        if entry is None:
            raise MismatchError(
                f"the checkpoint {self.folder} holds no tensor {name}; "
                "was it written for another model?"
            )
        dtype = stored_dtype(part.tensor)[0]
        if (entry.dtype, entry.shape) != (dtype, part.shape):
            raise MismatchError(
                f"the checkpoint {self.folder} holds {name} as {entry.dtype} {list(entry.shape)}, "
                f"the model wants {dtype} {list(part.shape)}; "
                "use the recipe that it was written with"
            )


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

    def read(self, name: str, piece: StoredSlice, values: Array, skipped: int = 0) -> None:
        """Fill `values` (C-contiguous) from byte `skipped` of a stored slice on.

        A whole slice is checked against its hash; a part cannot be. Raises CheckpointError.
        """
        path = self._folder / piece.file
        try:
            if piece.file not in self._open:
                self._open[piece.file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            hdf5.read_at(self._open[piece.file], values, piece.offset + skipped)
        except (OSError, EOFError) as failure:
            raise CheckpointError(
                f"cannot read {name} from {path}: {why(failure)}; use another checkpoint"
            ) from failure
        if values.nbytes == piece.nbytes and hdf5.digest(values) != piece.xxh3_128:
            raise CheckpointError(
                f"{name} in {path} is damaged: its hash differs; use another checkpoint"
            )


def _fill(
    files: _Files, name: str, piece: StoredSlice, array: Array, box: Box, in_part: bool
) -> int:
    """Fill the elements of `array` (the box `box` of the tensor) that a stored slice holds.

    Returns how many they are. `in_part`: read no more than the span that holds them.
    """
    shares, before = [], 0
    for stored in piece.boxes:
        if common := stored.common(box):
            first, last = common.span(stored)
            shares.append((before + first, before + last, common, stored))
        before += stored.numel
    if not shares:
        return 0
    count = sum(common.numel for _, _, common, _ in shares)
    begin = min(first for first, *_ in shares) if in_part else 0
    end = max(last for _, last, *_ in shares) if in_part else before
    target = array[shares[0][2].within(box)]
    if len(shares) == 1 and end - begin == count and target.flags.c_contiguous:
        # Straight into the tensor: nothing is copied where whole tensors are stored and wanted.
        files.read(name, piece, target, begin * array.itemsize)
        return count
    values = np.empty(end - begin, array.dtype)
    files.read(name, piece, values, begin * array.itemsize)
    for first, _, common, stored in shares:
        strides = [math.prod(stored.size[d + 1 :]) * array.itemsize for d in range(array.ndim)]
        # The span begins with the first element of the common box, so its strides are the box's.
        array[common.within(box)] = as_strided(values[first - begin :], common.size, strides)
    return count


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
