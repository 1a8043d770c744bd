"""Read files that should be plain ones. Nothing else is waited for, or read without end."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from mpillm.errors import UsageError
from mpillm.system.messages import explain

# Far above any log line, recipe or record, and small in memory.
LARGEST_TEXT = 1 << 24
# An index or a vocabulary grows with the model; this is far above the largest.
LARGEST_FILE = 1 << 31


def open_plain(path: Path, flags: int = 0) -> BinaryIO:
    """Open a plain file for reading, with further `flags` of open(2).

    Raises OSError for whatever else has that name: a read of a pipe or a device may never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise OSError(errno.EINVAL, f"it is {what} and should be a plain file", str(path))
    return os.fdopen(descriptor, "rb")


def read_plain(path: Path, flags: int = 0, most: int = LARGEST_TEXT) -> bytes:
    """Read a plain file of at most `most` bytes. Raises OSError for any other."""
    with open_plain(path, flags) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"it is larger than {most:,} bytes", str(path))
        return file.read()


def is_there(path: Path) -> bool:
    """Return whether `path` exists. Raises UsageError for a name that no file system takes."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as failure:
        # A NUL byte is a ValueError; letters that the file system's encoding lacks are one, too.
        reason = explain(failure, path) if isinstance(failure, OSError) else f"{path}: {failure}"
        raise UsageError(reason) from failure
    return True
