"""Text for people: what may reach a terminal and a shell, and failures of the system in words."""

import errno
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

# The controls C0 and C1 but for line ends and tabs, halves of characters, and the marks that
# reorder a line (Unicode's bidirectional embeddings and isolates).
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

# torch raises RuntimeError where memory is short, on the CPU and on a GPU.
NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|STATUS_ALLOC_FAILED", re.IGNORECASE
)

REMEDIES = {
    errno.ENOSPC: "free some space or name another place",
    errno.EDQUOT: "free some of your quota or name another place",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f) or name another place",
    errno.EACCES: "choose a place that you may use, or ask its owner",
    errno.EPERM: "choose a place that you may use, or ask its owner",
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "check the name",
    errno.ENXIO: "move it away",
    errno.ENOTDIR: "check the name: a part of it is a file",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle; remove one",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the host has too many open files; try again later",
    errno.EIO: "the file system reports a fault; read the host's log",
    errno.ESTALE: "the file system was mounted again; retry",
    errno.ENOMEM: "the host is out of memory; use fewer ranks or a smaller job",
}


def printable(text: str) -> str:
    """Write control characters as escapes such as `\\x1b`: no file rules a terminal."""
    return _HIDDEN.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def some_of(names: Iterable[str], most: int = 5) -> str:
    """Write the first `most` names, with … where there are more."""
    listed = list(names)
    return ", ".join(listed[:most]) + ", …" * (len(listed) > most)


def one_line(text: str | Path) -> str:
    """Write a name so that it stays on its line: line ends and tabs as escapes, too."""
    return _on_its_line(printable(str(text)))


def _on_its_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\t", "\\t")


def command(words: Iterable[str | Path]) -> str:
    """Join the words of a command so that it can be pasted into a shell."""
    return " ".join(_quoted(str(word)) for word in words)


def _quoted(word: str) -> str:
    """Quote a word; one with controls or bytes that are no UTF-8 in the form $'caf\\xe9'."""
    if printable(word) == word:
        return shlex.quote(word)
    return "$'" + "".join(map(_escaped, word)) + "'"


def _escaped(letter: str) -> str:
    if letter in "\\'":
        return f"\\{letter}"
    if printable(letter) == letter:
        return letter
    handler = "surrogateescape" if "\udc80" <= letter <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in letter.encode("utf-8", handler))


def explain(failure: OSError, path: Path | str | None = None) -> str:
    """Say which file failed, why, and what to do. `path`: where the failure itself names none."""
    name = path or failure.filename or failure.filename2
    reason = failure.strerror or str(failure) or type(failure).__name__
    code = failure.errno
    remedy = REMEDIES.get(code, "") if code is not None else ""
    place = (
        f"{_on_its_line(os.fsdecode(name))}: "
        if isinstance(name, str | bytes | os.PathLike)
        else ""
    )
    return f"{place}{reason}" + (f"; {remedy}" if remedy else "")


def why(failure: BaseException) -> str:
    """Return the reason of a failure alone, without its file and Python's `[Errno 2]`."""
    return getattr(failure, "strerror", None) or str(failure) or type(failure).__name__
