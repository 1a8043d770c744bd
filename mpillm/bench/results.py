"""Format results: a table for people, one JSON object or CSV lines for programs."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpillm.system.console import Console
from mpillm.system.json_text import to_json

SCHEMA, VERSION = "mpillm bench", 1
Row = dict[str, Any]
Show = Callable[[Row], str]


@dataclass(frozen=True)
class Section:
    """Hold one benchmark's results: `rows` in SI units, `columns` as head → text of a row."""

    what: str
    title: str
    rows: list[Row]
    columns: Mapping[str, Show]


def figure(value: Any) -> str:
    """Format a number with three significant digits; a dash for None."""
    if value is None:
        return "–"
    if not value:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}" if abs(value) >= 0.1 else f"{value:.2g}"


def text(key: str) -> Show:
    return lambda row: "–" if row.get(key) is None else str(row[key])


def whole(key: str) -> Show:
    return lambda row: "–" if row.get(key) is None else f"{row[key]:,}"


def scaled(key: str, factor: float) -> Show:
    """Show a key times `factor`: `scaled("median_seconds", 1e6)` in µs."""
    return lambda row: figure(None if row.get(key) is None else row[key] * factor)


def spread(key: str) -> Show:
    """Show median and quartiles of a ratio."""

    def show(row: Row) -> str:
        if row.get(key) is None:
            return "–"
        return f"{figure(row[key])} [{figure(row[key + '_q1'])}..{figure(row[key + '_q3'])}]"

    return show


TIME_COLUMNS: dict[str, Show] = {
    "min µs": scaled("min_seconds", 1e6),
    "median µs": scaled("median_seconds", 1e6),
    "p99 µs": scaled("p99_seconds", 1e6),
    "max µs": scaled("max_seconds", 1e6),
}


def print_sections(
    header: Mapping[str, str], sections: Sequence[Section], notes: Sequence[str], console: Console
) -> None:
    """Print all for people."""
    console.facts("mpillm bench", header)
    for section in sections:
        heads = list(section.columns)
        console.table(
            section.title,
            heads,
            [[section.columns[head](row) for head in heads] for row in section.rows],
        )
    for note in notes:
        console.say(f"note: {note}")


def as_json(header: Mapping[str, str], sections: Sequence[Section], notes: Sequence[str]) -> str:
    """Write one object: schema, version, header, results (`benchmark` and `rows`), notes."""
    results = [
        {"benchmark": section.what, "title": section.title, "rows": section.rows}
        for section in sections
    ]
    whole = {
        "schema": SCHEMA,
        "version": VERSION,
        "header": dict(header),
        "results": results,
        "notes": list(notes),
    }
    return to_json(whole) + "\n"


def as_csv(sections: Sequence[Section]) -> str:
    """Write one table: `benchmark`, then every key of any row; empty where a row has none."""
    rows = [{"benchmark": section.what, **row} for section in sections for row in section.rows]
    keys = dict.fromkeys(key for row in rows for key in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(keys) or ["benchmark"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
