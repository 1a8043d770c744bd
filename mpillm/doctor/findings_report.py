"""The report: rows grouped by area, with verdict, facts and remedy; or one JSON object."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mpillm.doctor.findings import FindingRow, count, hosts_text, worst
from mpillm.system.console import Console
from mpillm.system.json_text import to_json

WIDTH = 100
VERDICT_COLUMNS, NAME_COLUMNS = 9, 18
STYLES = {"error": "bold red", "warning": "yellow", "ok": "green"}
AREAS = (
    "software",
    "MPI",
    "host",
    "network",
    "GPU",
    "folders",
    "hosts",
    "neighbours",
    "batch system",
    "cluster profile",
)
Part = tuple[str, str]
"""A piece of a line and its style, "" for none."""


def report_lines(
    rows: Sequence[FindingRow], hosts: Sequence[str], width: int = WIDTH
) -> list[list[Part]]:
    """Write the report as lines of parts. `hosts`: all of the job; rows of some name them."""
    lines: list[list[Part]] = []
    for area in sorted({row.finding.area for row in rows}, key=_place):
        lines.append([(area, "bold")])
        for row in rows:
            if row.finding.area == area:
                lines += _lines(row, hosts, width)
    return [*lines, [(summary(rows), STYLES[worst(rows)])]]


def _place(area: str) -> tuple[int, str]:
    return (AREAS.index(area) if area in AREAS else len(AREAS), area)


def _lines(row: FindingRow, hosts: Sequence[str], width: int) -> list[list[Part]]:
    finding, indent = row.finding, 2 + VERDICT_COLUMNS + NAME_COLUMNS
    some = f"{hosts_text(row.hosts)}: " if row.hosts and len(row.hosts) < len(hosts) else ""
    texts = _wrap(some + finding.found, width - indent)
    if finding.remedy:
        texts += [
            ("→ " if number == 0 else "  ") + text
            for number, text in enumerate(_wrap(finding.remedy, width - indent - 2))
        ]
    head: list[Part] = [
        ("  ", ""),
        (f"{finding.verdict:<{VERDICT_COLUMNS}}", STYLES[finding.verdict]),
    ]
    if len(finding.name) < NAME_COLUMNS:
        first = [[*head, (f"{finding.name:<{NAME_COLUMNS}}{texts.pop(0)}", "")]]
    else:  # a long path gets a line to itself
        first = [[*head, (finding.name, "")]]
    return first + [[(" " * indent + text, "")] for text in texts]


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False) or [
        ""
    ]


def summary(rows: Sequence[FindingRow]) -> str:
    """Write `doctor: 1 error, 2 warnings, 24 ok`."""
    counts = count(rows)
    plural = {
        verdict: "s" if number != 1 and verdict != "ok" else ""
        for verdict, number in counts.items()
    }
    return "doctor: " + ", ".join(
        f"{number} {verdict}{plural[verdict]}" for verdict, number in counts.items()
    )


def report_json(
    rows: Sequence[FindingRow], facts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    findings = [asdict(row.finding) | {"hosts": list(row.hosts)} for row in rows]
    return {
        "verdict": worst(rows),
        "counts": count(rows),
        "findings": findings,
        "hosts": dict(facts),
    }


def print_findings(
    rows: Sequence[FindingRow],
    facts: Mapping[str, Mapping[str, Any]],
    as_json: bool,
    console: Console,
) -> int:
    """Print the report where `console` prints; return the exit code: 1 after an error, else 0."""
    if as_json:
        console.write(to_json(report_json(rows, facts), indent=1) + "\n")
    else:
        for parts in report_lines(rows, list(facts)):
            console.styled(parts)
    return int(worst(rows) == "error")
