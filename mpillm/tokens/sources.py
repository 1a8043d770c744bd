"""Sources → pieces → documents.

Pieces are cut in the same way for any number of ranks; each rank reads some of them.
"""

import json
import sysconfig
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpillm.errors import DataError, UsageError

STDLIB = "stdlib"
# Not the library itself: installed packages, its tests, and bundled programs.
NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "__pycache__",
}
JSONL_PIECE_BYTES = 16 << 20
# Git's rule: a file with a zero byte near its start isn't text.
PROBE_BYTES = 8000
MOST_SOURCES = 1 << 16  # /doc_source has two bytes
REPLACEMENT = "\ufffd"
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class SourcePiece:
    """The unit of reading: the bytes [start, stop) of a file of source number `source`.

    `lines`: a JSONL file, whose lines that start in the range are documents; else the file is one
    document. `found`: found in a folder rather than named, so it is skipped when it isn't text.
    """

    source: int
    path: str
    start: int
    stop: int
    lines: bool
    found: bool

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Texts(NamedTuple):
    """The documents of a piece; `replaced` counts the runs of bytes replaced by U+FFFD."""

    piece: SourcePiece
    documents: list[str]
    replaced: int


def list_pieces(
    sources: Sequence[str], glob: str = "**/*", exclude: Path | None = None
) -> list[SourcePiece]:
    """List the pieces of all sources, in an order that only their names decide.

    `exclude`: a folder to skip. Raises UsageError for a source that is missing or empty.
    """
    if not sources or len(sources) > MOST_SOURCES:
        raise UsageError(
            f"prepare takes 1 to {MOST_SOURCES:,} sources, got {len(sources)}; "
            "name a file, a folder or stdlib"
        )
    pieces: list[SourcePiece] = []
    for number, name in enumerate(sources):
        files, found = _files(name, glob, exclude)
        own = [piece for path in files for piece in _cut(number, path, found)]
        if not sum(piece.nbytes for piece in own):
            what = (
                f"no file matches {glob!r} with text in it"
                if found and not files
                else "it has no bytes"
            )
            raise UsageError(
                f"the source {name} is empty: {what}; give one with text, or another --glob"
            )
        pieces += own
    return pieces


def _files(name: str, glob: str, exclude: Path | None) -> tuple[list[Path], bool]:
    """List the files of a source; True when they were found in a folder."""
    path = Path(name)
    if name == STDLIB and not path.exists():
        root = Path(sysconfig.get_path("stdlib"))
        files = (p for p in root.rglob("*.py") if not NOT_LIBRARY & set(p.relative_to(root).parts))
        return sorted(files, key=lambda p: p.relative_to(root).as_posix()), True
    if path.is_file():
        return [path], False
    if not path.is_dir():
        raise UsageError(
            f"there is no source {name} (looked in {Path.cwd()}); "
            "give a text file, a .jsonl file, a folder or the word stdlib"
        )
    try:
        matches = [p.relative_to(path) for p in path.glob(glob)]
    except (ValueError, NotImplementedError) as failure:
        raise UsageError(
            f"--glob {glob!r} is not a pattern: {failure}; write one like '**/*.txt'"
        ) from failure
    seen = sorted((p for p in matches if not _hidden(p)), key=lambda p: p.as_posix())
    files_found = [path / p for p in seen if (path / p).is_file()]
    return [p for p in files_found if not (exclude and p.resolve().is_relative_to(exclude))], True


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _cut(source: int, path: Path, found: bool) -> Iterator[SourcePiece]:
    """Cut a JSONL file into ranges of fixed size; any other file is a piece, an empty one none."""
    try:
        nbytes = path.stat().st_size
    except OSError as failure:
        raise UsageError(
            f"cannot access {path}: {failure.strerror}; correct that or leave it out by --glob"
        ) from failure
    lines = path.suffix.lower() == ".jsonl"
    step = JSONL_PIECE_BYTES if lines else max(nbytes, 1)
    for start in range(0, nbytes, step):
        yield SourcePiece(source, str(path), start, min(start + step, nbytes), lines, found)


def pieces_of_rank(pieces: Sequence[SourcePiece], rank: int, size: int) -> range:
    """Number the pieces that `rank` of `size` reads: neighbours, with about its share of bytes."""
    nbytes = np.array([piece.nbytes for piece in pieces], np.float64)
    # A piece goes to the rank in whose share its middle is.
    middles = np.cumsum(nbytes) - nbytes / 2
    first, last = np.searchsorted(middles, nbytes.sum() * np.array([rank, rank + 1]) / size)
    return range(int(first), int(last))


def read_pieces(pieces: Sequence[SourcePiece], threads: int) -> Iterator[Texts]:
    """Yield the documents of `pieces` in order.

    `threads` files are read ahead: reads of many small files mostly wait.
    """
    with ThreadPoolExecutor(max(1, threads)) as pool:
        waiting: deque[Future[Texts]] = deque()
        for piece in pieces:
            waiting.append(pool.submit(read_piece, piece))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_piece(piece: SourcePiece) -> Texts:
    """Read a piece. Documents without a visible character are left out. Raises DataError."""
    try:
        with Path(piece.path).open("rb") as file:
            if piece.lines:
                return _read_lines(piece, file)
            data = file.read()
    except OSError as failure:
        raise DataError(
            f"cannot read {piece.path}: {failure.strerror}; correct that or leave the file out"
        ) from failure
    if piece.found and b"\0" in data[:PROBE_BYTES]:
        return Texts(piece, [], 0)
    text, replaced = decode_utf8(data)
    text = text.removeprefix(BYTE_ORDER_MARK)
    return Texts(piece, [text] if text.strip() else [], replaced)


def decode_utf8(data: bytes) -> tuple[str, int]:
    """Decode the text; count the runs of bytes that are replaced by U+FFFD."""
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        return text, text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())


def _read_lines(piece: SourcePiece, file: Any) -> Texts:
    """Read the lines that start in the piece: a line that began earlier is the last piece's."""
    documents: list[str] = []
    replaced = 0
    if piece.start:
        file.seek(piece.start - 1)
        file.readline()
    while (offset := file.tell()) < piece.stop and (line := file.readline()):
        text, bad = decode_utf8(line)
        document, odd = _field_text(text.removeprefix(BYTE_ORDER_MARK), piece.path, offset)
        replaced += bad + odd
        if document.strip():
            documents.append(document)
    return Texts(piece, documents, replaced)


def _field_text(line: str, path: str, offset: int) -> tuple[str, int]:
    """Return the field `text` of a JSON line, and count the lone surrogates replaced in it."""
    if not line.strip():
        return "", 0
    try:
        value = json.loads(line)
    except ValueError as failure:
        raise DataError(
            f"{_place(path, offset)} isn't JSON: {failure}; write one JSON object a line"
        ) from failure
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        has = (
            f"an object with {', '.join(sorted(value)[:8]) or 'nothing'}"
            if isinstance(value, dict)
            else type(value).__name__
        )
        raise DataError(
            f'{_place(path, offset)} has no string field "text" (it is {has}); '
            'write {"text": "…"} a line'
        )
    text: str = value["text"]
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON may name half of a surrogate pair; UTF-8 cannot.
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return whole, whole.count(REPLACEMENT) - text.count(REPLACEMENT)
    return text, 0


def _place(path: str, offset: int) -> str:
    with Path(path).open("rb") as file:
        before = sum(chunk.count(b"\n") for chunk in _chunks(file, offset))
    return f"{path} line {before + 1:,} (byte {offset:,})"


def _chunks(file: Any, nbytes: int) -> Iterator[bytes]:
    while nbytes > 0 and (chunk := file.read(min(nbytes, 1 << 20))):
        yield chunk
        nbytes -= len(chunk)
