"""What `mpillm report` writes: the story of a run as one page, from the files in its folder alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpillm.errors import UsageError
from mpillm.machine.topology import ranges_text
from mpillm.runs.history import KILLED, Attempt, object_at
from mpillm.runs.report.drawing import draw, draw_attempts, short
from mpillm.runs.report.page import Figure, Page, Picture, Table, render
from mpillm.runs.report.plots import plots
from mpillm.runs.state import RunState, read_run
from mpillm.runs.status import host_names, moment, state_text
from mpillm.runs.status import run_figures as status_figures
from mpillm.system.atomic import write_text
from mpillm.system.console import Console, binary_bytes, clock
from mpillm.system.versions import package_version

REPORT = "write_report.html"
BANDS = (
    "A band is an attempt, and its mark tells how it ended; dots are checkpoints; a dotted line leads from the end of "
    "an attempt to where the next one went on. Further down, such a line with a number marks the step where that "
    "attempt went on."
)
NO_WORD = ("", "no word of its end: a node was lost, or the job was killed at once")
LAST_SIGN = "Of an attempt that was killed without a word, the last sign is told: it may have lasted longer and come further."


def write_report(run: Path, console: Console, out: Path | None = None) -> None:
    """Write the report of a run, at work or not, and tell its name. Raises UsageError."""
    target = out or run / REPORT
    page = make_page(read_run(run))
    try:
        write_text(target, render(page))
    except OSError as failure:
        raise UsageError(
            f"cannot write {target}: {failure.strerror}; name a file in a folder that you may write to with --out"
        ) from failure
    console.say(f"wrote {target}")


def make_page(standing: RunState) -> Page:
    found = status_figures(standing)
    tables = [
        _attempts_table(standing.attempts),
        _hosts_table(standing.attempts),
        _checkpoints_table(standing),
    ]
    return Page(
        title=standing.name,
        folder=str(standing.run.resolve()),
        state=standing.state,
        headline=state_text(found),
        made=f"read {moment(standing.now)} (mpillm {package_version('mpillm')})",
        share=min(1.0, standing.step / standing.goal) if standing.goal else None,
        figures=_key_figures(standing, found),
        pictures=_pictures(standing),
        tables=[*(table for table in tables if table.rows), _versions_table(standing.attempts)],
        recipe={
            name: _rows(section)
            for name, section in standing.recipe.items()
            if isinstance(section, dict)
        },
    )


def _key_figures(standing: RunState, found: dict[str, Any]) -> list[Figure]:
    """Those that are known."""
    last = standing.attempts[-1].facts if standing.attempts else {}
    memory = [value for value in standing.steps.get("memory_bytes", ()) if value == value]
    trained = sum(attempt.seconds for attempt in standing.attempts)
    told: list[tuple[str, Any, str, str]] = [
        ("step", found["step"], "{:,}", f"of {standing.goal:,}" if standing.goal else ""),
        ("training loss", found["recent_loss"], "{:.4f}", "mean of the last steps"),
        (
            "validation loss",
            found["validation_loss"],
            "{:.4f}",
            f"at step {found['validation_step'] or 0:,}",
        ),
        ("tokens seen", found["tokens"], "{}", ""),
        ("tokens a second", found["tokens_per_second"], "{:,.0f}", "median of the last steps"),
        ("a step", found["step_seconds"], "{:.3g} s", "median of the last steps"),
        ("memory", max(memory, default=None), "{}", "of the largest rank"),
        ("parameters", last.get("parameters"), "{}", ""),
        ("ranks", last.get("ranks"), "{:,}", str(last.get("mesh") or "")),
        ("trained for", trained or None, "{}", _times(len(standing.attempts))),
        (
            "time left",
            found["seconds_left"] if standing.steps_left else None,
            "{}",
            "at this speed",
        ),
    ]
    shapes = {
        "tokens seen": short,
        "parameters": short,
        "memory": binary_bytes,
        "trained for": clock,
        "time left": clock,
    }
    return [
        Figure(label, form.format(shapes[label](value) if label in shapes else value), note)
        for label, value, form, note in told
        if isinstance(value, int | float)
    ]


def _times(count: int) -> str:
    return f"in {count:,} attempts" if count > 1 else "in one attempt"


def _pictures(standing: RunState) -> list[Picture]:
    found = []
    if standing.attempts:
        ends = dict.fromkeys(attempt.how for attempt in standing.attempts)
        svg = draw_attempts(standing.attempts, standing.goal)
        found.append(
            Picture("attempts", "Attempts", svg, [(how, how) for how in ends], BANDS, wide=True)
        )
    for plot in plots(standing):
        legend = [(line.label, line.colour) for line in plot.lines if line.label != plot.title]
        found.append(Picture(plot.key, plot.title, draw(plot), legend, plot.caption, plot.wide))
    return found


def _attempts_table(attempts: Sequence[Attempt]) -> Table:
    rows = [
        [
            str(attempt.number),
            moment(attempt.began.timestamp()),
            clock(attempt.seconds),
            attempt.how,
            f"{attempt.first_step:,} → {attempt.last_step:,}",
            f"{len(attempt.saved):,}",
            host_names(list(attempt.hosts)),
            str(attempt.facts.get("mesh") or attempt.facts.get("ranks") or ""),
            _job(attempt),
            attempt.reason or NO_WORD[attempt.how == KILLED],
        ]
        for attempt in attempts
    ]
    columns = ["", "began", "took", "ended", "steps", "saved", "hosts", "mesh", "job", "why"]
    note = LAST_SIGN if any(attempt.how == KILLED for attempt in attempts) else ""
    return Table("Attempts", columns, rows, frozenset({2, 4, 5}), note, wide=True)


def _job(attempt: Attempt) -> str:
    job = attempt.job
    restart = f", restart {job['restart']}" if job.get("restart") else ""
    return f"{job['scheduler']} {job['id']}{restart}" if job else ""


def _hosts_table(attempts: Sequence[Attempt]) -> Table:
    """Of the newest attempt."""
    hosts = attempts[-1].hosts if attempts else {}
    rows = [[name, str(len(ranks)), ranges_text(ranks)] for name, ranks in hosts.items()]
    facts = attempts[-1].facts if attempts else {}
    told = [
        f"mesh {facts['mesh']}" if facts.get("mesh") else "",
        f"threads a rank: {facts['threads']}" if facts.get("threads") else "",
    ]
    return Table(
        "Hosts", ["host", "ranks", "which"], rows, frozenset({1}), ", ".join(filter(None, told))
    )


def _checkpoints_table(standing: RunState) -> Table:
    seconds = {
        str(event.facts.get("checkpoint")): event.facts.get("seconds")
        for attempt in standing.attempts
        for event in attempt.saved
    }
    rows = []
    for kept in standing.checkpoints:
        name = str(kept.folder.relative_to(standing.run))
        took = seconds.get(name)
        rows.append(
            [
                name,
                f"{kept.step:,}",
                binary_bytes(kept.bytes),
                moment(kept.written),
                f"{took:.2f} s" if isinstance(took, int | float) else "",
            ]
        )
    saved = sum(len(attempt.saved) for attempt in standing.attempts)
    note = f"{saved:,} were saved in all; these are kept." if saved > len(rows) else ""
    return Table(
        "Checkpoints",
        ["checkpoint", "step", "size", "written", "took"],
        rows,
        frozenset({1, 2, 4}),
        note,
    )


def _versions_table(attempts: Sequence[Attempt]) -> Table:
    """Of the newest attempt."""
    facts = attempts[-1].facts if attempts else {}
    rows = [["MPI", str(facts["mpi"])]] if facts.get("mpi") else []
    rows += [
        [str(name), str(version)]
        for name, version in object_at(facts, "versions").items()
        if name != "MPI"
    ]
    return Table("Versions", (), rows or [["mpillm", "no history tells"]])


def _rows(section: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (key, value if isinstance(value, str) else json.dumps(value, default=str))
        for key, value in section.items()
    ]
