"""Records of files that are no JSON lines: JSON arrays, CSV and TSV, Parquet, SQuAD's nested JSON,
and two texts line by line. Each file is read by one rank, from its start.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

from mpillm.errors import DataError
from mpillm.system.extras import require_packages
from mpillm.system.json_text import from_json
from mpillm.system.messages import one_line, printable
from mpillm.system.plain_files import encoding_of, open_plain, read_text
from mpillm.tokens.text.records import RecordError
from mpillm.tokens.text.text_blocks import BYTE_ORDER_MARK

# The kind of table that a name promises.
TABLE_ENDINGS = MappingProxyType({".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"})
DELIMITERS = MappingProxyType({"csv": ",", "tsv": "\t"})
# JSON is parsed as a whole, in several times its size.
LARGEST_JSON = 2 << 30
# Beyond Python's own 128 KiB, which answers of a page exceed.
LARGEST_CELL = 1 << 30
PARQUET_ROWS = 1024

Record = tuple[int, Any]


def read_table(path: Path, kind: str, encoding: str, partner: str = "") -> Iterator[Record]:
    """Yield the records of a table with their numbers from 1.

    `kind`: json, csv, tsv, parquet, or parallel, whose records are a `source` and, of the file
    `partner`, a `target`. Raises RecordError, DataError, OSError, and UsageError without a package.
    """
    if kind == "json":
        records = _json_records(path)
    elif kind == "parquet":
        records = _parquet_records(path)
    elif kind == "parallel":
        records = _parallel_records(path, Path(partner), encoding)
    else:
        records = _rows(path, encoding, DELIMITERS[kind])
    return enumerate(records, 1)


def _json_records(path: Path) -> Iterator[Any]:
    try:
        value = from_json(read_text(path, most=LARGEST_JSON))
    except ValueError as failure:
        raise DataError(
            f"{one_line(path)} isn't JSON: {printable(str(failure))}; "
            "write an array of objects, or one object a line to a .jsonl file"
        ) from failure
    if isinstance(value, list):
        return iter(value)
    if isinstance(value, dict) and is_squad(value):
        return squad_records(value)
    return iter([value])


def is_squad(value: Mapping[str, Any]) -> bool:
    """Return whether an object is a file of SQuAD: articles of paragraphs under `data`."""
    data = value.get("data")
    return isinstance(data, list) and all(
        isinstance(each, dict) and isinstance(each.get("paragraphs"), list) for each in data
    )


def squad_records(value: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a record for each question, with the keys of the published tables of SQuAD.

    `answers` holds the lists `text` and `answer_start`, as many as there are answers.
    """
    for article in value["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph.get("qas", []):
                answers = asked.get("answers", [])
                yield {
                    "id": asked.get("id", ""),
                    "title": article.get("title", ""),
                    "context": paragraph.get("context"),
                    "question": asked.get("question"),
                    "answers": {
                        key: [each.get(key) for each in answers] for key in ("text", "answer_start")
                    },
                }


@contextmanager
def large_cells() -> Iterator[None]:
    """Let csv read long cells meanwhile: its limit is one of all readers in the process."""
    before = csv.field_size_limit(LARGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _rows(path: Path, encoding: str, delimiter: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a file with a head, by its columns. Raises RecordError."""
    with large_cells(), _opened(path, encoding) as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            head = next(reader, [])
            for cells in reader:
                if cells and len(cells) != len(head):
                    raise RecordError(
                        f"has {len(cells)} cells and its head {len(head)} columns "
                        f"({', '.join(head[:8])}); quote cells that hold the delimiter"
                    )
                if cells:
                    yield dict(zip(head, cells, strict=True))
        except csv.Error as failure:
            raise RecordError(f"cannot be read: {failure}; save the table again") from failure


def _parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    require_packages(f"the Parquet file {path}", "pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_ROWS):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as failure:
        raise DataError(
            f"{one_line(path)} is no Parquet file that can be read: {printable(str(failure))}; "
            "write it again"
        ) from failure


def _parallel_records(path: Path, partner: Path, encoding: str) -> Iterator[dict[str, str]]:
    with open_plain(partner) as file:
        other = encoding_of(file.read(len(BYTE_ORDER_MARK.encode("utf-32"))))[0]
    with _opened(path, encoding, "\n") as sources, _opened(partner, other, "\n") as targets:
        for source, target in zip_longest(sources, targets):
            if source is None or target is None:
                longer, shorter = (path, partner) if target is None else (partner, path)
                raise RecordError(
                    f"is beyond the end of {one_line(shorter)}: {one_line(longer)} has more "
                    "lines; give two files of equally many"
                )
            # Lines that are empty on both sides part paragraphs.
            if source.strip() or target.strip():
                yield {"source": source.strip("\r\n"), "target": target.strip("\r\n")}


def _opened(path: Path, encoding: str, newline: str = "") -> TextIO:
    """Open a text without its byte-order mark; bytes that are no text become U+FFFD."""
    text = io.TextIOWrapper(open_plain(path), encoding, "replace", newline=newline)
    if text.read(1) != BYTE_ORDER_MARK:
        text.seek(0)
    return text
