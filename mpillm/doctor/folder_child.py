"""A child of doctor: write, read and lock a small file in one folder. A file server may hang it.

`folder_child.py SYS_PATH FOLDER BYTES` prints one JSON object: {"failure": [number, step] or null,
"write_seconds", "read_seconds", "locks": {"flock": …, "fcntl": …}}. A lock is "kept", "granted
twice", or the name of its error.
"""

import errno
import fcntl
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

PIECE_BYTES = 1 << 20
LOCKS: dict[str, Callable[[int, int], None]] = {"flock": fcntl.flock, "fcntl": fcntl.lockf}
"""HDF5 asks for the first, most other programs for the second."""


def main() -> None:
    folder, nbytes = Path(sys.argv[2]), int(sys.argv[3])
    path = folder / f".mpillm-doctor-{os.getpid()}-{secrets.token_hex(4)}"
    found: dict[str, Any] = {"failure": None}
    step = "open"
    try:
        # A missing folder is another fault than a file that cannot be made.
        folder.stat()
        step = "write"
        found["write_seconds"] = write_file(path, nbytes)
        step = "read"
        found["read_seconds"] = read_file(path)
        step = "lock"
        found["locks"] = {name: try_lock(path, lock) for name, lock in LOCKS.items()}
    except OSError as failure:
        found["failure"] = [failure.errno or 0, step]
    finally:
        with suppress(OSError):  # it was never made
            path.unlink()
    sys.stdout.write(json.dumps(found) + "\n")


def write_file(path: Path, nbytes: int) -> float:
    """Write `nbytes`; return the seconds until they are on the disk or the server."""
    piece = os.urandom(PIECE_BYTES)  # some file systems compress
    started = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for _ in range(max(1, nbytes // PIECE_BYTES)):
            left = memoryview(piece)
            while left:
                left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return time.perf_counter() - started


def read_file(path: Path) -> float:
    """Read the file; return the seconds, from the disk where the system drops its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while os.read(descriptor, PIECE_BYTES):
            pass
        return time.perf_counter() - started
    finally:
        os.close(descriptor)


def try_lock(path: Path, lock: Callable[[int, int], None]) -> str:
    """Take a lock, and return whether another process that asks for it is refused."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        try:
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as failure:
            return errno.errorcode.get(failure.errno or 0, "refused")
        child = os.fork()
        if child == 0:
            os._exit(ask(path, lock))
        return (
            "kept" if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1 else "granted twice"
        )
    finally:
        os.close(descriptor)


def ask(path: Path, lock: Callable[[int, int], None]) -> int:
    """Return 1 where the lock is refused, as it should be. Opens a file handle of its own."""
    try:
        lock(os.open(path, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return 1
    return 0


if __name__ == "__main__":
    main()
