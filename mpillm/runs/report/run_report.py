"""`mpillm report`: a run as one page, from the files in its folder alone."""

import errno
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpillm.errors import UsageError
from mpillm.machine.topology import ranges_text
from mpillm.runs.folder import REPORT
from mpillm.runs.history import KILLED, Attempt, finite_seconds, object_at
from mpillm.runs.report.drawing import draw_attempts, draw_plot, short
from mpillm.runs.report.evaluation_figures import evaluation_tables, reliability_picture
from mpillm.runs.report.page import Figure, Page, Picture, Table, render_page
from mpillm.runs.report.plots import step_plots
from mpillm.runs.state import RunState, read_run
from mpillm.runs.status import host_names, moment, state_text
from mpillm.runs.status import run_figures as status_figures
from mpillm.system.atomic import write_text
from mpillm.system.console import Console, binary_bytes, clock
from mpillm.system.json_lines import whole_number
from mpillm.system.versions import package_version

BANDS = (
    "A band is an attempt, and its mark shows how it ended; dots are checkpoints; a dotted line "
    "leads from the end of an attempt to the start of the next one. Further down, such a line with "
    "a number marks the step where that attempt continued."
)
NO_END = ("", "no end on record: a node was lost, or the job was killed at once")
LAST_TRACE = (
    "For an attempt without an end on record the last trace is shown: "
    "it may have lasted longer and done more steps."
)


def write_report(run: Path, console: Console, out: Path | None = None) -> None:
    """Write the report of a run, while it trains or after, and print its name.

    Raises UsageError for another folder than a run's, and where the file cannot be written.
    """
    target, run_state = out or run / REPORT, read_run(run)
    page = render_page(make_page(run_state))
    for damage in run_state.damage.values():
        console.warn(damage)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        write_text(target, page)
    except OSError as failure:
        raise UsageError(
            f"cannot write {target}: {failure.strerror}; "
            "name a file in a folder that you may write to with --out"
        ) from failure
    console.say(f"wrote {target}")


def make_page(run_state: RunState) -> Page:
    found = status_figures(run_state)
    tables = [
        *evaluation_tables(run_state.scores),
        _attempts_table(run_state.attempts),
        _hosts_table(run_state.attempts),
        _checkpoints_table(run_state),
    ]
    return Page(
        title=run_state.name,
        folder=str(run_state.run.resolve()),
        state=run_state.state,
        headline=state_text(found),
        made="; ".join(
            [
                f"read {moment(run_state.now)} (mpillm {package_version('mpillm')})",
                *run_state.damage.values(),
            ]
        ),
        share=min(1.0, run_state.step / run_state.goal) if run_state.goal else None,
        figures=_key_figures(run_state, found),
        pictures=_pictures(run_state),
        tables=[*(table for table in tables if table.rows), _versions_table(run_state.attempts)],
        recipe={
            name: _rows(section)
            for name, section in run_state.recipe.items()
            if isinstance(section, dict)
        },
    )


def _memory_note(memory: dict[str, int | None]) -> str:
    predicted = memory["predicted_bytes"]
    more = f", {binary_bytes(predicted)} predicted" if predicted else ""
    return f"of the largest rank{more}"


def _key_figures(run_state: RunState, found: dict[str, Any]) -> list[Figure]:
    """Collect the key figures that are known."""
    last = run_state.attempts[-1].facts if run_state.attempts else {}
    memory = [value for value in run_state.steps.get("memory_bytes", ()) if 0 <= value < math.inf]
    trained = sum(attempt.seconds for attempt in run_state.attempts)
    listed: list[tuple[str, Any, str, str]] = [
        ("step", found["step"], "{:,}", f"of {run_state.goal:,}" if run_state.goal else ""),
        ("training loss", found["recent_loss"], "{:.4f}", "mean of the last steps"),
        (
            "validation loss",
            found["validation_loss"],
            "{:.4f}",
            f"at step {found['validation_step'] or 0:,}",
        ),
        *_best_figure(found["best_checkpoint"]),
        ("tokens seen", found["tokens"], "{}", ""),
        ("tokens a second", found["tokens_per_second"], "{:,.0f}", "median of the last steps"),
        ("a step", found["step_seconds"], "{:.3g} s", "median of the last steps"),
        ("memory", max(memory, default=None), "{}", _memory_note(found["memory"])),
        ("parameters", whole_number(last.get("parameters")), "{}", ""),
        ("ranks", whole_number(last.get("ranks")), "{:,}", str(last.get("mesh") or "")),
        ("trained for", trained or None, "{}", _times(len(run_state.attempts))),
        (
            "time left",
            found["seconds_left"] if run_state.steps_left else None,
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
        for label, value, form, note in listed
        if isinstance(value, int | float)
    ]


def _best_figure(best: dict[str, Any] | None) -> list[tuple[str, Any, str, str]]:
    if best is None:
        return []
    name = best["metric"].replace("_", " ")
    return [(f"best {name}", best["value"], "{:.4f}", f"kept: step {best['step']:,}")]


def _times(count: int) -> str:
    return f"in {count:,} attempts" if count > 1 else "in one attempt"


def _pictures(run_state: RunState) -> list[Picture]:
    found = []
    if run_state.attempts:
        ends = dict.fromkeys(attempt.how for attempt in run_state.attempts)
        svg = draw_attempts(run_state.attempts, run_state.goal)
        found.append(
            Picture("attempts", "Attempts", svg, [(how, how) for how in ends], BANDS, wide=True)
        )
    for plot in step_plots(run_state):
        legend = [(line.label, line.colour) for line in plot.lines if line.label != plot.title]
        found.append(
            Picture(plot.key, plot.title, draw_plot(plot), legend, plot.caption, plot.wide)
        )
    found += reliability_picture(run_state.scores)
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
            attempt.reason or NO_END[attempt.how == KILLED],
        ]
        for attempt in attempts
    ]
    columns = ["", "began", "took", "ended", "steps", "saved", "hosts", "mesh", "job", "why"]
    note = LAST_TRACE if any(attempt.how == KILLED for attempt in attempts) else ""
    return Table("Attempts", columns, rows, frozenset({2, 4, 5}), note, wide=True)


def _job(attempt: Attempt) -> str:
    job = attempt.job
    restart = f", restart {job['restart']}" if job.get("restart") else ""
    return f"{job['scheduler']} {job['id']}{restart}" if job else ""


def _hosts_table(attempts: Sequence[Attempt]) -> Table:
    """List those of the newest attempt."""
    hosts = attempts[-1].hosts if attempts else {}
    rows = [[name, str(len(ranks)), ranges_text(ranks)] for name, ranks in hosts.items()]
    facts = attempts[-1].facts if attempts else {}
    notes = [
        f"mesh {facts['mesh']}" if facts.get("mesh") else "",
        f"threads a rank: {facts['threads']}" if facts.get("threads") else "",
    ]
    return Table(
        "Hosts", ["host", "ranks", "which"], rows, frozenset({1}), ", ".join(filter(None, notes))
    )


def _checkpoints_table(run_state: RunState) -> Table:
    seconds = {
        str(event.facts.get("checkpoint")): event.facts.get("seconds")
        for attempt in run_state.attempts
        for event in attempt.saved
    }
    rows = []
    for kept in run_state.checkpoints:
        name = str(kept.folder.relative_to(run_state.run))
        took = finite_seconds(seconds.get(name))
        rows.append(
            [
                f"{name} (best)" if kept.folder == run_state.best else name,
                f"{kept.step:,}",
                binary_bytes(kept.bytes),
                moment(kept.written),
                "" if took is None else f"{took:.2f} s",
            ]
        )
    saved = sum(len(attempt.saved) for attempt in run_state.attempts)
    note = f"{saved:,} were saved in all; these are kept." if saved > len(rows) else ""
    return Table(
        "Checkpoints",
        ["checkpoint", "step", "size", "written", "took"],
        rows,
        frozenset({1, 2, 4}),
        note,
    )


def _versions_table(attempts: Sequence[Attempt]) -> Table:
    """List those of the newest attempt."""
    facts = attempts[-1].facts if attempts else {}
    rows = [["MPI", str(facts["mpi"])]] if facts.get("mpi") else []
    rows += [
        [str(name), str(version)]
        for name, version in object_at(facts, "versions").items()
        if name != "MPI"
    ]
    return Table("Versions", (), rows or [["mpillm", "not on record"]])


def _rows(section: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (key, value if isinstance(value, str) else json.dumps(value, default=str))
        for key, value in section.items()
    ]
