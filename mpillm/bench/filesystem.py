"""Time shards and checkpoints, written and read by the functions that training calls."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpillm.bench import statistics
from mpillm.bench.context import BenchContext
from mpillm.bench.results import TIME_COLUMNS, Row, Section, Show, scaled, text, whole
from mpillm.bench.timing import Call, slowest
from mpillm.comm.failure import on_root
from mpillm.errors import UsageError
from mpillm.system.extras import install_command, installed
from mpillm.tokens.manifest import NO_TOKENIZER, Manifest, Split
from mpillm.tokens.reader import open_split
from mpillm.tokens.shards import Documents, write_shard
from mpillm.tokens.windows import ReadPlan

if TYPE_CHECKING:
    from mpi4py import MPI

# As a recipe with a context of 1024 reads them: inputs and the next token.
WINDOW_TOKENS = 1025
# A batch, and as many of them as give a steady rate.
ROWS = 64
WINDOWS = 16 * ROWS
MEAN_DOCUMENT_TOKENS = 4096
# Several, as in a model: the ranks divide tensors among them when they write.
TENSORS = 16
COLUMNS: dict[str, Show] = {
    "path": text("path"),
    "bytes": whole("bytes"),
    **TIME_COLUMNS,
    "MB/s all": scaled("all_bytes_per_second", 1e-6),
}


def run_filesystem(bench: BenchContext) -> list[Section]:
    """Write and read shards and checkpoints of each size (bytes a rank) under `--folder`.

    Every rank calls it; all files are removed. Raises UsageError without a folder that it can write
    to.
    """
    options, rows = bench.options, list[Row]()
    if options.folder is None:
        if options.what != "all":
            raise UsageError(
                "bench filesystem needs --folder DIR: a folder on the file system to measure"
            )
        bench.note(
            "filesystem is left out; name a folder on the file system to measure with --folder DIR"
        )
        return []
    sizes, with_checkpoints = options.sizes_of("filesystem"), installed("torch")
    if not with_checkpoints:
        bench.note(f"checkpoints are left out: torch is not installed ({install_command('torch')})")
    with (
        temporary_folder(bench.comm, options.folder) as folder,
        bench.progress("filesystem", 2 * len(sizes)) as advance,
    ):
        for size in sizes:
            rows += _tokens(bench, folder / f"tokens-{size}", size)
            advance()
            if with_checkpoints:
                rows += _checkpoint(bench, folder / f"checkpoint-{size}", size)
            advance()
    return [
        Section(
            "filesystem",
            f"filesystem: {options.folder}, {bench.comm.size} ranks at once",
            rows,
            COLUMNS,
        )
    ]


@contextmanager
def temporary_folder(comm: "MPI.Intracomm", parent: Path) -> Iterator[Path]:
    """Make a folder in `parent`, the same on each rank, and remove it with its files.

    Every rank enters it.
    """
    path = on_root(comm, lambda: _new_folder(parent))
    try:
        yield path
        comm.Barrier()
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    if comm.rank == 0:
        shutil.rmtree(path, ignore_errors=True)


def _new_folder(parent: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="mpillm-bench-", dir=parent))
    except OSError as failure:
        raise UsageError(
            f"--folder {parent}: {failure.strerror}; name an existing folder that you may write to"
        ) from failure


def _tokens(bench: BenchContext, folder: Path, nbytes: int) -> list[Row]:
    """Write a shard a rank, then read random windows of all shards: warm, cold, cold with
    readahead.
    """
    comm, options = bench.comm, bench.options
    on_root(comm, folder.mkdir)
    tokens = np.random.default_rng(comm.rank).integers(
        0, 32768, max(nbytes // 2, 2 * WINDOW_TOKENS), np.uint16
    )
    ends = np.append(
        np.arange(MEAN_DOCUMENT_TOKENS, len(tokens), MEAN_DOCUMENT_TOKENS), len(tokens)
    )
    nothing = np.zeros(len(ends), np.uint64)
    documents = Documents(tokens, ends, nothing, nothing)
    started = time.perf_counter()
    info = write_shard(folder / f"train-{comm.rank:05d}.h5", documents, {})
    written = np.array([time.perf_counter() - started])
    shards = tuple(comm.allgather(info))
    total = sum(shard.n_tokens for shard in shards)
    split = Split(total, len(ends) * comm.size, 0, shards)
    splits = {"train": split, "validation": Split(0, 0, 0, ())}
    on_root(comm, lambda: Manifest(folder, NO_TOKENIZER, {}, splits).save())
    rows = [_row("write shards", tokens.nbytes, comm.size, slowest(comm, written))]
    out = np.empty((ROWS, WINDOW_TOKENS), np.uint16)
    draw = np.random.default_rng(1000 + comm.rank)
    with open_split(folder, "train") as reader:

        def read(ahead: bool) -> float:
            plan = ReadPlan(reader, draw.integers(0, total - WINDOW_TOKENS, WINDOWS), WINDOW_TOKENS)
            started = time.perf_counter()
            if ahead:
                plan.advise(0, WINDOWS)
            for first in range(0, WINDOWS, ROWS):
                plan.fetch(first, out)
            return time.perf_counter() - started

        # The names become keys of the cluster profile: they stay as version 1 has them.
        ways = {"warm": (False, False), "cold": (True, False), "cold, told ahead": (True, True)}
        moved = WINDOWS * WINDOW_TOKENS * 2
        for name, (cold, ahead) in ways.items():
            forget = _forgetter(comm, folder) if cold else lambda: None
            seconds = _rounds(comm, lambda ahead=ahead: read(ahead), forget, options.iterations)  # type: ignore[misc]
            rows.append(_row(f"read windows, {name}", moved, comm.size, seconds))
    return rows


def _checkpoint(bench: BenchContext, folder: Path, nbytes: int) -> list[Row]:
    """Write one checkpoint of `nbytes` a rank; each rank reads all of it, as a resumed run does."""
    import torch

    from mpillm.weights.checkpoint import Checkpoint
    from mpillm.weights.saving import save as save_checkpoint

    comm = bench.comm
    on_root(comm, folder.mkdir)
    count = max(1, nbytes * comm.size // 4 // TENSORS)
    tensors = {
        f"model/layers/{index}/weight": torch.full((count,), float(index))
        for index in range(TENSORS)
    }
    whole = TENSORS * count * 4
    iterations = min(3, bench.options.iterations)
    made: list[Path] = []

    def save() -> float:
        started = time.perf_counter()
        made.append(save_checkpoint(folder, tensors, {"step": 1}, {}, comm))
        return time.perf_counter() - started

    def load() -> float:
        started = time.perf_counter()
        Checkpoint(made[-1]).load(tensors)
        return time.perf_counter() - started

    written = _rounds(comm, save, lambda: None, iterations)
    warm = _rounds(comm, load, lambda: None, iterations)
    cold = _rounds(comm, load, _forgetter(comm, made[-1]), iterations)
    # One checkpoint is written by all; every rank reads all of it.
    return [
        _row("write checkpoint", whole, 1, written),
        _row("read checkpoint, warm", whole, comm.size, warm),
        _row("read checkpoint, cold", whole, comm.size, cold),
    ]


def _rounds(
    comm: "MPI.Intracomm", once: Callable[[], float], before: Call, iterations: int
) -> statistics.Seconds:
    measured = []
    for _ in range(iterations):
        before()
        comm.Barrier()
        measured.append(once())
    return slowest(comm, np.array(measured))


def _forgetter(comm: "MPI.Intracomm", folder: Path) -> Call:
    """Make the call that drops the folder's pages from the page cache, where it has one."""

    def forget() -> None:
        comm.Barrier()
        for path in sorted(folder.iterdir()):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    return forget


def _row(path: str, nbytes: int, ranks: int, seconds: statistics.Seconds) -> Row:
    times = statistics.times(seconds)
    return {
        "path": path,
        "bytes": nbytes,
        **times.row(),
        "all_bytes_per_second": statistics.rate(ranks * nbytes, times.median),
    }
