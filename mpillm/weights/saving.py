"""Write checkpoints: each rank writes its slices to its own file, and one rename commits them."""

import errno
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mpillm.errors import CheckpointError, MpillmError
from mpillm.system import hdf5
from mpillm.system.atomic import flush, write_json
from mpillm.system.console import binary_bytes
from mpillm.system.messages import explain
from mpillm.weights.host_pieces import host_pieces
from mpillm.weights.index import FORMAT, VERSION, VERSION_WITH_BOXES, with_digest
from mpillm.weights.leftovers import MARKER, is_own, remove, temporary_folder
from mpillm.weights.places import BEST, INDEX, checkpoint_folders, step_folder
from mpillm.weights.slices import Box, Held, TensorSlice, slices_of, stored_dtype, whole_box

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
    guard: Callable[[], None] = lambda: None,
) -> Path:
    """Write `folder`/step-N, where N is `facts["step"]`, and return it.

    Every rank calls it with the tensors or slices that it holds and the same facts. A slice
    that several ranks hold has the same values on each; different slices of one name tile the
    whole tensor. `texts`: small files (name → contents) of the checkpoint. Until the rename the
    checkpoint does not exist. When any rank fails, the temporary folder is removed and every rank
    raises CheckpointError. So it does where a file, a link or a folder with other files has the
    checkpoint's name. `guard`: called on rank 0 just ahead of the rename; its MpillmError is
    raised on every rank, and nothing is saved.
    """
    target = step_folder(folder, facts["step"])
    parts = {
        SliceKey(name, part.start, tuple(part.tensor.shape), part.shape): part
        for name, held in tensors.items()
        for part in slices_of(held)
    }
    sizes = {key: part.tensor.numel() * part.tensor.element_size() for key, part in parts.items()}
    shares = assign_writers(comm.allgather(sizes))
    _check_tiles([key for keys in shares for key in keys])
    own = {key: parts[key] for key in shares[comm.rank]}
    temporary: Path | None = None
    try:
        # Rank 0 makes the folder: no other rank can know its name.
        temporary = _on_all(comm, target, _begin, target, texts, comm.rank)[0]
        assert temporary is not None
        written = _on_all(comm, target, _write_share, temporary, own, comm.rank)
        if comm.rank == 0:
            _on_all(comm, target, _commit, temporary, target, (facts, texts), written, guard)
        else:
            _on_all(comm, target, lambda: None)
    except BaseException:
        # Rank 0 alone: after a lone failure of another rank the others may still write there, and
        # the next start removes it.
        if temporary and comm.rank == 0:
            with suppress(OSError):
                remove(temporary)
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
    comm: "MPI.Intracomm", target: Path, work: Callable[..., Value], *arguments: Any
) -> list[Value]:
    """Run `work` on each rank and return all results; if one fails, raise on all ranks."""
    result: Value | None = None
    fault: MpillmError | None = None
    try:
        result = work(*arguments)
    except (OSError, RuntimeError) as failure:  # h5py reports a full disk as either
        fault = CheckpointError(
            f"rank {comm.rank} could not write the checkpoint {target}: "
            f"{_explain(failure, target)}; then use --resume"
        )
    except MpillmError as failure:
        fault = failure
    answers: list[tuple[Any, MpillmError | None]] = comm.allgather((result, fault))
    if first := next((fault for _, fault in answers if fault), None):
        raise first
    return [result for result, _ in answers]


def _explain(failure: OSError | RuntimeError, target: Path) -> str:
    """Say why a file could not be written: h5py hides the system's reason in HDF5's words."""
    code = getattr(failure, "errno", None)
    if code is None and (found := re.search(r"errno = (\d+)", str(failure))):
        code = int(found[1])
    if code is None:
        return f"{failure}; choose another train.run"
    words = explain(OSError(code, os.strerror(code)))
    if code in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            free = shutil.disk_usage(target.parent).free
            words += f" ({binary_bytes(free)} are free there)"
    return words


def _begin(target: Path, texts: Mapping[str, str], rank: int) -> Path | None:
    """Make the temporary folder with its small texts, on rank 0."""
    if rank:
        return None
    check_replaceable(target)
    temporary = temporary_folder(target)
    try:
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise
    return temporary


def check_replaceable(target: Path) -> None:
    """Raise CheckpointError where the name of a checkpoint is taken by something else."""
    if (target.exists() or target.is_symlink()) and not is_own(target):
        what = (
            "a link"
            if target.is_symlink()
            else "a folder with files of its own"
            if target.is_dir()
            else "a file"
        )
        raise CheckpointError(
            f"{target} is {what}, and a checkpoint needs the name; move it to another folder"
        )


def _write_share(
    temporary: Path, own: Mapping[SliceKey, TensorSlice], rank: int
) -> list[WrittenSlice]:
    """Write this rank's slices into its own file; a rank without any writes no file."""
    if not own:
        return []
    path = temporary / f"rank-{rank:05d}.h5"
    dtypes = {key: stored_dtype(part.tensor) for key, part in own.items()}
    names = {
        key: key.name if key.size == key.shape else _slice_name(key.name, key.start, key.size)
        for key in own
    }
    arrays = {names[key]: (dtype, key.size) for key, (_, dtype) in dtypes.items()}
    places = hdf5.layout(path, arrays, {})
    written = []
    with path.open("r+b", buffering=0) as file:
        for key, part in own.items():
            offset, done, digest = places[names[key]].offset, 0, hdf5.Digest()
            for array in host_pieces(part.tensor):
                hdf5.write_at(file.fileno(), array, offset + done)
                digest.add(array)
                done += array.nbytes
            entry = {
                "file": path.name,
                "offset": offset,
                "nbytes": done,
                **_extent(key),
                "xxh3_128": digest.text,
            }
            written.append(WrittenSlice(key, dtypes[key][0], entry))
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
    described: tuple[Mapping[str, Any], Mapping[str, str]],
    written: list[list[WrittenSlice]],
    guard: Callable[[], None],
) -> None:
    """Write the index and rename the folder. `described`: the facts and the texts."""
    facts, texts = described
    tensors: dict[str, dict[str, Any]] = {}
    boxes = False
    everything = (part for share in written for part in share)
    for part in sorted(everything, key=attrgetter("key")):
        empty = {"dtype": part.dtype, "shape": part.key.shape, "pieces": []}
        tensors.setdefault(part.key.name, empty)["pieces"].append(part.entry)
        boxes = boxes or "start" in part.entry
    files = {
        path.name: path.stat().st_size
        for path in sorted(temporary.iterdir())
        if path.name != MARKER
    }
    for name in files:
        flush(temporary / name)
    index = {
        "format": FORMAT,
        # An earlier mpillm refuses version 2 by its number, before it meets an unknown slice.
        "version": VERSION_WITH_BOXES if boxes else VERSION,
        "facts": dict(facts),
        "files": files,
        "hashes": {name: hdf5.digest(text.encode("utf-8")) for name, text in texts.items()},
        "tensors": tensors,
    }
    write_json(temporary / INDEX, with_digest(index))
    # A damaged checkpoint of the same step, which a resumed run has passed over.
    check_replaceable(target)
    guard()
    if target.exists():
        remove(target)
    # Last: a kill at any moment leaves a folder that its marker or its index shows to be ours.
    (temporary / MARKER).unlink()
    flush(temporary)
    temporary.rename(target)
    flush(target.parent)


def mark_best(folder: Path, step: int) -> None:
    """Let the link `best` in `folder` lead to the checkpoint of `step`; 0: remove the link.

    One rank calls it. The link is relative, so it survives a move. Raises OSError, also where
    something else has its name.
    """
    link = folder / BEST
    if not link.is_symlink() and link.exists():
        why = "it is no link, and the best checkpoint has its name; move it away"
        raise FileExistsError(errno.EEXIST, why, str(link))
    target = step_folder(folder, step)
    if not step or not target.is_dir():
        link.unlink(missing_ok=True)
        return
    # One job holds the run, so no other one makes this link; a killed job may have left it.
    temporary = folder / f".{BEST}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.rename(link)


def prune(folder: Path, keep: int, good: Collection[int], best: int = 0) -> list[str]:
    """Remove all but the newest `keep` good checkpoints, and that of step `best`; return what
    could not be removed.

    One rank calls it after a save. `good`: the steps of which that is known, the one just saved
    among them: those that this job has saved, and the one that it restored. Others don't count,
    for a resumed run may have passed them over as damaged. Newer ones than the last good one stay.
    Links and folders with other files are not touched.
    """
    last = max(good, default=0)
    kept, faults = 0, []
    for step, path in sorted(checkpoint_folders(folder).items(), reverse=True):
        if step > last or path.is_symlink():
            continue
        if kept < keep:
            kept += step in good
        elif step != best and is_own(path):
            try:
                remove(path)
            except OSError as failure:
                faults.append(explain(failure, path))
    return faults
