"""Read files that should be plain ones. Nothing else is waited for, or read without end."""

import codecs
import errno
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from mpillm.errors import UsageError
from mpillm.system.messages import explain

# Far above any log line, recipe or record, and small in memory.
LARGEST_TEXT = 1 << 24
# An index or a vocabulary grows with the model; this is far above the largest.
LARGEST_FILE = 1 << 31
# Open files of this process, which a shell makes of <(…).
SUBSTITUTED = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
# UTF-32 first: its mark begins with UTF-16's.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
NAME_BYTES = 255


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
            raise _too_large(path, most)
        return file.read()


def _too_large(path: Path, most: int) -> OSError:
    # EFBIG is of writes: its remedy would be another one.
    return OSError(errno.EOVERFLOW, f"it is larger than {most:,} bytes", str(path))


def read_text(path: Path, most: int = LARGEST_TEXT) -> str:
    """Read UTF-8, or UTF-16 and UTF-32 with a byte-order mark, which is taken off.

    A pipe of a shell's `<(…)` will do. Raises OSError, and ValueError for another encoding.
    """
    if str(path).startswith(SUBSTITUTED):
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise _too_large(path, most)
    else:
        content = read_plain(path, most=most)
    encoding, start = encoding_of(content)
    try:
        return content[start:].decode(encoding)
    except UnicodeDecodeError as failure:
        raise ValueError(
            f"byte {start + failure.start:,} is not {encoding.upper()}; save it as UTF-8"
        ) from failure


def encoding_of(head: bytes) -> tuple[str, int]:
    """Return the encoding that a byte-order mark names, and the mark's length; UTF-8 without."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    return "utf-8", 0


def is_plain_name(name: Any) -> bool:
    """Return whether `name` is that of a file in the folder itself: no path, no hidden file."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= NAME_BYTES
        and not name.startswith(".")
        and not any(letter in "/\\" or ord(letter) < 32 for letter in name)
    )


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
