"""Shared memory that cannot be had: the same reason on every rank, and no file left."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mpillm.comm.shared.segment import FOLDER, share_segment


@contextmanager
def limited(kind: int, nbytes: int) -> Iterator[None]:
    """As `ulimit` limits this process; within the test alone, for pytest writes a log."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def left_by(comm: Any) -> list[str]:
    """List the segments of this job's processes in /dev/shm."""
    comm.Barrier()
    first = comm.bcast(f"mpillm-{os.getpid()}-")
    found = [path.name for path in FOLDER.iterdir() if path.name.startswith(first)]
    comm.Barrier()
    return found


def test_a_limit_of_file_sizes(comm: Any) -> None:
    # As `ulimit -f`.
    with limited(resource.RLIMIT_FSIZE, 4096):
        found = share_segment(comm, 1 << 16)
    assert isinstance(found, str)
    assert "File too large" in found
    assert len(set(comm.allgather(found))) == 1
    assert left_by(comm) == []


def test_a_limit_of_memory_is_not_a_full_folder(comm: Any) -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # As `ulimit -v`: the file has its length, and no memory yet.
    with limited(resource.RLIMIT_AS, mapped + (256 << 20)):
        found = share_segment(comm, 1 << 30)
    assert isinstance(found, str)
    assert "the memory limit of the job" in found
    assert "free" not in found
    assert len(set(comm.allgather(found))) == 1
    assert left_by(comm) == []


@pytest.mark.parametrize("place", ["missing", "a file"])
def test_a_folder_that_cannot_be_used(comm: Any, folder: Path, place: str) -> None:
    if comm.rank == 0:
        (folder / "a file").write_text("")
    comm.Barrier()
    found = share_segment(comm, 4096, folder / place)
    assert isinstance(found, str)
    assert "cannot open" in found
    assert len(set(comm.allgather(found))) == 1


@pytest.mark.parametrize("nbytes", [1 << 46, 1 << 62])
def test_more_memory_than_there_is(comm: Any, nbytes: int) -> None:
    found = share_segment(comm, nbytes)
    assert isinstance(found, str)
    assert len(set(comm.allgather(found))) == 1
    assert left_by(comm) == []


def test_a_segment_leaves_no_name(comm: Any) -> None:
    found = share_segment(comm, 100)
    assert not isinstance(found, str)
    assert left_by(comm) == []
    found.own[:] = comm.rank + 1
    comm.Barrier()
    assert [int(row[99]) for row in found.rows] == list(range(1, comm.size + 1))
    comm.Barrier()
