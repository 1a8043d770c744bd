"""Write checkpoints: each rank writes its slices to its own file, and one rename commits them."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mpillm.errors import CheckpointError
from mpillm.system import hdf5
from mpillm.system.atomic import flush, write_json
from mpillm.weights.checkpoint import FORMAT, VERSION, VERSION_WITH_BOXES
from mpillm.weights.places import INDEX, checkpoint_folders, step_folder
from mpillm.weights.slices import Box, Held, TensorSlice, raw, slices_of, whole_box

if TYPE_CHECKING:
    from mpi4py import MPI

Value = TypeVar("Value")
Key = TypeVar("Key", bound=Any)


class SliceKey(NamedTuple):
    """A slice of a named tensor, whichever ranks hold it; `shape` is the whole tensor's."""

    name: str
    start: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]


class WrittenSlice(NamedTuple):
    """A slice in a file: its tensor's dtype, and its entry of the index."""

    key: SliceKey
    dtype: str
    entry: dict[str, Any]


def assign_writers(held: Sequence[Mapping[Key, int]]) -> list[list[Key]]:
    """Assign each slice to one of the ranks that hold it: the largest first, to the least loaded.

    `held[rank]`: the bytes of each slice that the rank holds. Every rank computes the same lists,
    so no message is needed.
    """
    holders: dict[Key, list[int]] = {}
    for rank, keys in enumerate(held):
        for key in keys:
            holders.setdefault(key, []).append(rank)
    sizes = {key: nbytes for keys in held for key, nbytes in keys.items()}
    shares: list[list[Key]] = [[] for _ in held]
    loads = [0] * len(held)
    for negative, key in sorted((-nbytes, key) for key, nbytes in sizes.items()):
        # The lowest of equally loaded ranks: holders are in the order of their ranks.
        rank = min(holders[key], key=loads.__getitem__)
        shares[rank].append(key)
        loads[rank] -= negative
    return [sorted(keys) for keys in shares]


def save(
    folder: Path,
    tensors: Mapping[str, Held],
    facts: Mapping[str, Any],
    texts: Mapping[str, str],
    comm: "MPI.Intracomm",
) -> Path:
    """Write `folder`/step-N, where N is `facts["step"]`, and return it.

    Every rank calls it with the CPU tensors or slices that it holds and the same facts. A slice
    that several ranks hold has the same values on each; different slices of one name tile the
    whole tensor. `texts`: small files (name → contents) of the checkpoint. Until the rename the
    checkpoint does not exist. When any rank fails, the temporary folder is removed and every rank
    raises CheckpointError.
    """
    target = step_folder(folder, facts["step"])
    temporary = folder / f".{target.name}.tmp"
    parts = {
        SliceKey(name, part.start, tuple(part.tensor.shape), part.shape): part
        for name, held in tensors.items()
        for part in slices_of(held)
    }
    sizes = {key: part.tensor.numel() * part.tensor.element_size() for key, part in parts.items()}
    shares = assign_writers(comm.allgather(sizes))
    _check_tiles([key for keys in shares for key in keys])
    own = {key: parts[key] for key in shares[comm.rank]}
    try:
        _on_all(comm, temporary, _begin, temporary, texts, comm.rank)
        written = _on_all(comm, temporary, _write_share, temporary, own, comm.rank)
        _on_all(comm, temporary, _commit, temporary, target, facts, written, comm.rank)
    except KeyboardInterrupt:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _check_tiles(keys: Sequence[SliceKey]) -> None:
    """Assert that the slices of each name have as many elements as the whole tensor."""
    missing: dict[tuple[str, tuple[int, ...]], int] = {}
    for key in keys:
        whole = (key.name, key.shape)
        missing[whole] = missing.get(whole, math.prod(key.shape)) - math.prod(key.size)
    wrong = [name for (name, _), count in missing.items() if count]
    assert not wrong, f"the slices of {wrong} do not tile the whole tensors"
    assert len({name for name, _ in missing}) == len(missing), "one name, two whole shapes"


def _on_all(
    comm: "MPI.Intracomm", temporary: Path, work: Callable[..., Value], *arguments: Any
) -> list[Value]:
    """Run `work` on each rank and return all results; if one fails, clean up and raise on all."""
    result, reason = None, ""
    try:
        result = work(*arguments)
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


def _begin(temporary: Path, texts: Mapping[str, str], rank: int) -> None:
    if rank:
        return
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, text in texts.items():
        (temporary / name).write_text(text, encoding="utf-8")


def _write_share(
    temporary: Path, own: Mapping[SliceKey, TensorSlice], rank: int
) -> list[WrittenSlice]:
    """Write this rank's slices into its own file; a rank without any writes no file."""
    if not own:
        return []
    path = temporary / f"rank-{rank:05d}.h5"
    values = {key: raw(part.tensor) for key, part in own.items()}
    names = {
        key: key.name if key.size == key.shape else _slice_name(key.name, key.start, key.size)
        for key in own
    }
    arrays = {names[key]: (array.dtype, array.shape) for key, (_, array) in values.items()}
    places = hdf5.layout(path, arrays, {})
    written = []
    with path.open("r+b", buffering=0) as file:
        for key, (dtype, array) in values.items():
            if not array.flags.c_contiguous:
                array = array.copy()
            offset = places[names[key]].offset
            hdf5.write_at(file.fileno(), array, offset)
            entry = {
                "file": path.name,
                "offset": offset,
                "nbytes": array.nbytes,
                **_extent(key),
                "xxh3_128": hdf5.digest(array),
            }
            written.append(WrittenSlice(key, dtype, entry))
    flush(path)
    return written


def _slice_name(name: str, start: Sequence[int], size: Sequence[int]) -> str:
    """Name the HDF5 dataset of a slice as NumPy would index it: `model/head/weight[0:64,32:48]`."""
    cuts = (f"{first}:{first + n}" for first, n in zip(start, size, strict=True))
    return f"{name}[{','.join(cuts)}]"


def _extent(key: SliceKey) -> dict[str, Any]:
    """Describe a slice in the index: as a run of elements where it is one, else as a box."""
    count = math.prod(key.size)
    if key.size == key.shape:
        return {"first": 0, "count": count}
    first, last = Box(key.start, key.size).span(whole_box(key.shape))
    if last - first == count:
        return {"first": first, "count": count}
    return {"start": list(key.start), "size": list(key.size)}


def _commit(
    temporary: Path,
    target: Path,
    facts: Mapping[str, Any],
    written: list[list[WrittenSlice]],
    rank: int,
) -> None:
    if rank:
        return
    tensors: dict[str, dict[str, Any]] = {}
    boxes = False
    everything = (part for share in written for part in share)
    for part in sorted(everything, key=attrgetter("key")):
        empty = {"dtype": part.dtype, "shape": part.key.shape, "pieces": []}
        tensors.setdefault(part.key.name, empty)["pieces"].append(part.entry)
        boxes = boxes or "start" in part.entry
    files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    for name in files:
        flush(temporary / name)
    index = {
        "format": FORMAT,
        # An earlier mpillm refuses version 2 by its number, before it meets an unknown slice.
        "version": VERSION_WITH_BOXES if boxes else VERSION,
        "facts": dict(facts),
        "files": files,
        "tensors": tensors,
    }
    write_json(temporary / INDEX, index)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    flush(target.parent)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints. One rank calls it, after a save."""
    for old in list(checkpoint_folders(folder).values())[:-keep]:
        # Renamed first: a removal cut short never leaves half a checkpoint under a real name.
        trash = old.with_name(f".trash-{old.name}")
        old.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
