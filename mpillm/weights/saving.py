"""Writing checkpoints: all ranks write their share side by side, and one rename makes it a checkpoint."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from mpillm.errors import CheckpointError
from mpillm.system import hdf5
from mpillm.system.atomic import flush, write_json
from mpillm.weights.checkpoint import StoredSlice, StoredTensor, dtype_name, index_json, raw
from mpillm.weights.places import INDEX

if TYPE_CHECKING:
    from mpi4py import MPI

Value = TypeVar("Value")


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def assign_writers(held: Sequence[Mapping[str, int]]) -> list[list[str]]:
    """Which rank writes which tensor: the largest first, each to the rank that holds it and has least to write so far.

    `held[rank]`: the bytes of each tensor that the rank holds. The same on each rank, so nobody has to be told.
    """
    holders: dict[str, list[int]] = {}
    for rank, names in enumerate(held):
        for name in names:
            holders.setdefault(name, []).append(rank)
    sizes = {name: nbytes for names in held for name, nbytes in names.items()}
    shares: list[list[str]] = [[] for _ in held]
    loads = [0] * len(held)
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min(holders[name], key=lambda rank: (loads[rank], rank))
        shares[rank].append(name)
        loads[rank] += sizes[name]
    return [sorted(names) for names in shares]


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    texts: Mapping[str, str],
    comm: "MPI.Intracomm",
) -> Path:
    """Write `folder`/step-N, where N is `facts["step"]`, and return it.

    Every rank calls it with the tensors that it holds (CPU, contiguous) and the same facts; a name that several ranks
    hold is the same tensor on each. `texts`: small files (name → contents) that
    go along. Until the rename the checkpoint does not exist; on any failure, of any rank, the temporary folder is
    removed and every rank raises CheckpointError.
    """
    target = step_folder(folder, facts["step"])
    temporary = folder / f".{target.name}.tmp"
    own = {
        name: tensors[name] for name in assign_writers(comm.allgather(_sizes(tensors)))[comm.rank]
    }
    try:
        _together(comm, temporary, lambda: _begin(temporary, texts) if comm.rank == 0 else None)
        written = _together(comm, temporary, lambda: _write_share(temporary, own, comm.rank))
        _together(
            comm,
            temporary,
            lambda: _commit(temporary, target, facts, written) if comm.rank == 0 else None,
        )
    except KeyboardInterrupt:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _together(comm: "MPI.Intracomm", temporary: Path, work: Callable[[], Value]) -> list[Value]:
    """Do `work` on each rank and return all results; if it fails on one, clean up and raise on all."""
    result, reason = None, ""
    try:
        result = work()
    except (OSError, RuntimeError) as failure:  # h5py reports a full disk as either
        reason = f"rank {comm.rank} could not write the checkpoint {temporary}: {failure}"
    answers: list[tuple[Any, str]] = comm.allgather((result, reason))
    failed = [reason for _, reason in answers if reason]
    if failed:
        if comm.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{failed[0]}; free some space or choose another train.run, then use --resume"
        )
    return [result for result, _ in answers]


def _begin(temporary: Path, texts: Mapping[str, str]) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, text in texts.items():
        (temporary / name).write_text(text, encoding="utf-8")


def _write_share(
    temporary: Path, tensors: Mapping[str, Tensor], rank: int
) -> dict[str, StoredTensor]:
    """This rank's tensors into its own file; a rank without any writes none."""
    arrays = {name: raw(tensor) for name, tensor in tensors.items()}
    if not arrays:
        return {}
    path = temporary / f"rank-{rank:05d}.h5"
    places = hdf5.layout(
        path, {name: (array.dtype, array.shape) for name, array in arrays.items()}, {}
    )
    entries = {}
    with hdf5.opened(path, flags=hdf5.READ_WRITE) as descriptor:
        for name, array in arrays.items():
            hdf5.write_at(descriptor, array, places[name].offset)
            piece = StoredSlice(
                path.name, places[name].offset, array.nbytes, 0, array.size, hdf5.digest(array)
            )
            entries[name] = StoredTensor(dtype_name(tensors[name]), tuple(array.shape), (piece,))
    flush(path)
    return entries


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}


def _commit(
    temporary: Path, target: Path, facts: Mapping[str, Any], written: list[dict[str, StoredTensor]]
) -> None:
    entries = {name: entry for part in written for name, entry in part.items()}
    files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    for name in files:
        flush(temporary / name)
    write_json(temporary / INDEX, index_json(facts, entries, files))
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    flush(target.parent)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints. One rank calls it, after a newer one was written."""
    for old in sorted(folder.glob("step-*"))[:-keep]:
        # Renamed first, so that a removal cut short never leaves half a checkpoint under a real name.
        trash = old.with_name(f".trash-{old.name}")
        old.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
