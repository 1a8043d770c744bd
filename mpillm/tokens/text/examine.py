"""Examine a file before anything is read: its size, its encoding, and what its lines are."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mpillm.system.messages import command, explain
from mpillm.system.plain_files import encoding_of
from mpillm.tokens.text.file_kinds import (
    HEAD_BYTES,
    FileKind,
    argument,
    cure,
    kind_by_mark,
    kind_of,
    renamed,
)
from mpillm.tokens.text.records import RecordError, field_of, parsed
from mpillm.tokens.text.tables import TABLE_ENDINGS
from mpillm.tokens.text.text_blocks import BYTE_ORDER_MARK, Lines, decode

# Names that promise a record a line.
LINES_ENDINGS = (".jsonl", ".ndjson")
# A first record that is longer is taken for one by its first letter.
LONGEST_FIRST_RECORD = 16 << 20
ARRAY = FileKind("one JSON array", "JSON that isn't a record a line")
SPREAD = FileKind("JSON that isn't a record a line", "JSON that isn't a record a line")
UNSIZED = FileKind("a file whose size is not known", "file without a size")


@dataclass(frozen=True)
class FileFacts:
    """What a file is: text of `nbytes` in `encoding`, whose lines are records if `lines`.

    `kind` and `remedy`: it is no text. `suspect`: a text that looks like records. `failure`: it
    cannot be read. `table`: the kind of table that it is, where tables are read; "" for none.
    """

    nbytes: int = 0
    encoding: str = "utf-8"
    lines: bool = False
    kind: FileKind | None = None
    remedy: str = ""
    suspect: bool = False
    failure: str = ""
    table: str = ""


def examine(name: str, named: bool, field: str, tables: bool = False) -> FileFacts:
    """Examine a plain file. `named` by the user: what is no text is for the caller to refuse.

    `tables`: JSON arrays, CSV, TSV and Parquet are read, too.
    """
    path = Path(name)
    try:
        with path.open("rb") as file:
            found = _examine(path, file, named, field)
            return _as_table(found, path, file) if tables else found
    except OSError as failure:
        return FileFacts(failure=explain(failure, path))


def _examine(path: Path, file: BinaryIO, named: bool, field: str) -> FileFacts:
    nbytes = os.fstat(file.fileno()).st_size
    head = file.read(HEAD_BYTES)
    encoding, _ = encoding_of(head)
    if not nbytes and head:
        words = command(["cp", argument(path), "corpus.txt"])
        return FileFacts(kind=UNSIZED, remedy=f"copy it first: `{words}`")
    ending = path.suffix.lower()
    lines = ending in LINES_ENDINGS
    # A zero byte in a file of records is damage, which the reader names by its line.
    kind = kind_by_mark(head) if lines else kind_of(head)
    if kind:
        return FileFacts(nbytes, kind=kind, remedy=cure(kind, path))
    suspect = False
    if ending == ".json":
        lines, kind = _json_kind(_first_line(file, encoding), named, field)
    elif not lines:
        suspect = decode(head, encoding)[0].lstrip(f"{BYTE_ORDER_MARK} \r\n").startswith('{"') and (
            isinstance(_record(_first_line(file, encoding)), dict)
        )
    return FileFacts(nbytes, encoding, lines, kind, _json_cure(kind, path), suspect)


def _as_table(found: FileFacts, path: Path, file: BinaryIO) -> FileFacts:
    """Take a file for a table where its form or its ending says so."""
    if found.kind in (ARRAY, SPREAD) or (found.lines and _is_nested(file)):
        table = "json"
    elif found.kind is not None:
        table = "parquet" if found.kind.name == "Parquet" else ""
    else:
        table = TABLE_ENDINGS.get(path.suffix.lower(), "")
    return FileFacts(found.nbytes, found.encoding, table=table) if table else found


def _is_nested(file: BinaryIO) -> bool:
    """Return whether a file of one line, such as SQuAD's, holds many records in one object."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    return b'"data"' in head and b'"paragraphs"' in head


def _first_line(file: BinaryIO, encoding: str) -> str:
    """Read the first line with a visible character, up to a limit."""
    file.seek(0)
    reader = Lines(file, encoding)
    left = LONGEST_FIRST_RECORD
    while left > 0 and (data := reader.read(left)):
        left -= len(data)
        text = decode(data, encoding)[0].removeprefix(BYTE_ORDER_MARK).strip()
        if text:
            return text
    return ""


def _json_kind(line: str, named: bool, field: str) -> tuple[bool, FileKind | None]:
    """Decide by the first line of a .json file: whether it holds records, else its kind."""
    if line.startswith("["):
        return False, ARRAY
    record = _record(line)
    if isinstance(record, dict):
        # Among other files, a one-line configuration must not end the search.
        is_text = named or isinstance(field_of(record, field), str)
        other = f'JSON without the field "{field}"'
        return is_text, None if is_text else FileKind(other, other)
    if line.startswith("{") and len(line) < LONGEST_FIRST_RECORD - 1:
        return False, SPREAD
    return True, None if named or not line or line.startswith("{") else SPREAD


def _record(line: str) -> object:
    try:
        return parsed(line)
    except RecordError:
        return None


def _json_cure(kind: FileKind | None, path: Path) -> str:
    """Say how to make a record a line of other JSON."""
    if kind is None:
        return ""
    query = ".[]" if kind is ARRAY else "."
    to = command([renamed(path, ".jsonl")])
    return f"write a record a line: `{command(['jq', '-c', query, argument(path)])} > {to}`"
