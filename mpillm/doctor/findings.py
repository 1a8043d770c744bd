"""Findings of checks: an area, a name, a verdict, the facts and the remedy; merged over hosts."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "error"]
VERDICTS: tuple[Verdict, ...] = ("error", "warning", "ok")
MISSED = "report it, with the output of `mpillm doctor --json`"
NUMBER = re.compile(r"(\d[\d,]*(?:\.\d+)?)")


@dataclass(frozen=True)
class Finding:
    """The result of a check. `remedy` is empty where nothing needs to be done."""

    area: str
    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class FindingRow:
    """A row of the report: a finding and its hosts; none for the whole job."""

    finding: Finding
    hosts: tuple[str, ...] = ()


def guarded(area: str, name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Run `check`; turn an exception into an error finding, so that no rank waits for this one."""
    try:
        return list(check())
    except Exception as failure:
        found = f"this check itself failed: {type(failure).__name__}: {failure}"
        return [Finding(area, name, "error", found, MISSED)]


def merge(by_host: Mapping[str, Sequence[Finding]]) -> list[FindingRow]:
    """Merge findings of hosts that differ in numbers alone, in the order of their first one."""
    groups: dict[tuple[str, ...], list[tuple[str, Finding]]] = {}
    for host, findings in by_host.items():
        for finding in findings:
            groups.setdefault(_likeness(finding), []).append((host, finding))
    return [_row(group) for group in groups.values()]


def _likeness(finding: Finding) -> tuple[str, ...]:
    texts = (finding.found, finding.remedy)
    return (finding.area, finding.name, finding.verdict, *(NUMBER.sub("#", text) for text in texts))


def _row(group: Sequence[tuple[str, Finding]]) -> FindingRow:
    first = group[0][1]
    found = ranged([finding.found for _, finding in group])
    remedy = ranged([finding.remedy for _, finding in group])
    hosts = dict.fromkeys(host for host, _ in group)
    return FindingRow(Finding(first.area, first.name, first.verdict, found, remedy), tuple(hosts))


def ranged(texts: Sequence[str]) -> str:
    """Merge ["3 GiB free", "5 GiB free"] into `3–5 GiB free`; only numbers may differ."""
    parts = [NUMBER.split(text) for text in texts]
    joined = []
    for column in zip(*parts, strict=True):
        values = sorted(set(column), key=lambda value: (_number(value), value))
        joined.append(values[0] if len(values) == 1 else f"{values[0]}–{values[-1]}")
    return "".join(joined)


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return 0.0


def worst(rows: Iterable[FindingRow]) -> Verdict:
    found = {row.finding.verdict for row in rows}
    return next((verdict for verdict in VERDICTS if verdict in found), "ok")


def count(rows: Iterable[FindingRow]) -> dict[Verdict, int]:
    """Count the rows of each verdict, errors first."""
    verdicts = [row.finding.verdict for row in rows]
    return {verdict: verdicts.count(verdict) for verdict in VERDICTS}


def hosts_text(names: Sequence[str], most: int = 6) -> str:
    """Write n1, n2, n3, n7 as `n1–n3, n7`; more than `most` runs end in `and 9 more`."""
    runs: list[list[str]] = []
    for name in names:
        if runs and name == _next(runs[-1][-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    texts = [run[0] if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs[:most]]
    left = sum(map(len, runs[most:]))
    return ", ".join(texts) + (f" and {left} more" if left else "")


def _next(name: str) -> str:
    """Return the name whose last number is one more: n09 → n10; "" without a number."""
    found = re.fullmatch(r"(.*?)(\d+)(\D*)", name)
    if not found:
        return ""
    head, number, tail = found.groups()
    return f"{head}{int(number) + 1:0{len(number)}d}{tail}"
