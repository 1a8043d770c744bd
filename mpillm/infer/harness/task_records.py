"""Read the records of a task's local files, with the types that the library datasets gives them."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpillm.errors import DataError, UsageError
from mpillm.infer.harness.task_file import DataFiles
from mpillm.system.json_text import from_json
from mpillm.system.messages import explain, printable, some_of
from mpillm.system.plain_files import read_text
from mpillm.tokens.text.records import RecordError, parsed
from mpillm.tokens.text.tables import large_cells, read_table

Record = dict[str, Any]
# Cells that are no value, as of pandas.
NOTHING = frozenset(
    {
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    }
)
TRUTHS: Mapping[str, bool] = {
    **dict.fromkeys(("True", "TRUE", "true"), True),
    **dict.fromkeys(("False", "FALSE", "false"), False),
}


@dataclass(frozen=True)
class TaskRecords:
    """The records of a split, all with the same columns; `place` is for messages."""

    rows: Sequence[Record]
    columns: tuple[str, ...]
    place: str


def read_split(data: DataFiles, split: str, folder: Path) -> TaskRecords:
    """Read a split of a task; `folder`: that of the task file.

    A relative path begins in the current folder, as for the harness, else in `folder`. Raises
    UsageError for a split or a file that is not there, DataError for one that cannot be read or
    holds no record.
    """
    if split not in data.files:
        raise UsageError(
            f"the split {split!r} is not in dataset_kwargs.data_files, which has "
            f"{some_of(data.files)}; files without a split are those of train"
        )
    rows: list[Record] = []
    for name in data.files[split]:
        path = _found(name, folder)
        try:
            rows += _read(path, data)
        except OSError as failure:
            raise DataError(f"cannot read {explain(failure, path)}") from failure
    place = some_of(data.files[split])
    if not rows:
        raise DataError(f"{place} holds no record, so nothing can be scored; name another file")
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    # A column that a record lacks is empty in it.
    whole = [{name: row.get(name) for name in columns} for row in rows]
    return TaskRecords(_with_floats(whole, columns), columns, place)


def _found(name: str, folder: Path) -> Path:
    if "://" in name:
        raise UsageError(
            f"data_files names {name}, and files of the network are not fetched; "
            "download it, and name the local file"
        )
    places = dict.fromkeys((Path(name), folder / name))
    for path in places:
        if path.is_file():
            return path
    raise UsageError(
        f"data_files names {name}, and there is no file {' nor '.join(map(str, places))}; correct "
        "the name, or start where it begins"
    )


def _read(path: Path, data: DataFiles) -> list[Record]:
    if data.kind == "text":
        lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return [{"text": line} for line in (lines if lines[-1] else lines[:-1])]
    if data.kind == "csv":
        return _csv_records(path, data.delimiter)
    if data.kind == "parquet":
        return [record for _, record in read_table(path, "parquet", "utf-8")]
    return _json_records(path, data.field)


def _json_records(path: Path, field: str) -> list[Record]:
    text = read_text(path)
    if field or text.lstrip().startswith("["):
        try:
            value: Any = from_json(text)
        except ValueError as failure:
            raise DataError(
                f"{path} isn't JSON: {printable(str(failure))}; correct it"
            ) from failure
        if field:
            if not isinstance(value, dict) or field not in value:
                raise DataError(f"{path} has no field {field!r} (dataset_kwargs.field); correct it")
            value = value[field]
        if isinstance(value, dict) and all(isinstance(each, list) for each in value.values()):
            value = [
                dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)
            ]
    else:
        value = [_parsed(path, *each) for each in enumerate(text.split("\n"), 1) if each[1].strip()]
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise DataError(f"{path} holds no list of JSON objects; write one object a line")
    return value


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return parsed(line)
    except RecordError as failure:
        raise DataError(f"{path}: line {number:,} {failure}") from failure


def _csv_records(path: Path, delimiter: str) -> list[Record]:
    try:
        with large_cells():
            head, *rows = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    except (csv.Error, ValueError, TypeError) as failure:
        raise DataError(f"{path} is no table with a head: {failure}; save it again") from failure
    rows = [row for row in rows if row]
    if twice := [name for place, name in enumerate(head) if name in head[:place]]:
        raise DataError(f"{path} has two columns named {twice[0]!r}; rename or remove one")
    if any(len(row) > len(head) for row in rows):
        raise DataError(
            f"{path} has a row of more cells than its head ({some_of(head)}); quote cells that "
            "hold the delimiter, or name it by dataset_kwargs.sep"
        )
    filled = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    columns = [_typed(list(cells)) for cells in zip(*filled, strict=True)]
    return [dict(zip(head, row, strict=True)) for row in zip(*columns, strict=True)]


def _typed(cells: list[str]) -> list[Any]:
    """Return the values of a column: of the first type that all its cells have."""
    held = [cell for cell in cells if cell not in NOTHING]
    if held and all(cell in TRUTHS for cell in held):
        return [TRUTHS.get(cell) for cell in cells]
    try:
        if len(held) == len(cells):
            return [int(_number(cell)) for cell in cells]
    except ValueError:
        pass
    try:
        # A column of nothing alone has no numbers either.
        return [None if cell in NOTHING else float(_number(cell)) for cell in cells]
    except ValueError:
        return [None if cell in NOTHING else cell for cell in cells]


def _number(cell: str) -> str:
    """Return the cell. Raises ValueError where Python alone reads it as a number, as 1_000."""
    if "_" in cell or not cell.isascii():
        raise ValueError(cell)
    return cell


def _with_floats(rows: list[Record], columns: Iterable[str]) -> list[Record]:
    """Make a column of whole and of other numbers one of floats: a table has one type a column."""
    for name in columns:
        kinds = {type(row[name]) for row in rows} - {type(None)}
        if kinds == {int, float}:
            for row in rows:
                row[name] = None if row[name] is None else float(row[name])
    return rows
