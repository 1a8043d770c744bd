"""`mpillm report`: one page that needs no network, with every plot, after any course of a run."""

import html.parser
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape
from mpi4py import MPI

from mpillm.errors import UsageError
from mpillm.runs.report.downsample import curve, smooth, thin
from mpillm.runs.report.page import render_page
from mpillm.runs.report.run_report import make_page, write_report
from mpillm.runs.state import read_run
from mpillm.system.atomic import write_text
from mpillm.system.console import Console
from mpillm.tokens.prepare import PrepareOptions, prepare
from tests.fixtures.browser import Browser, open_browser

# A page knows nothing of ranks, and is too much work to be made on each of them.
pytestmark = pytest.mark.usefixtures("processes")
QUIET = Console(speaks=False)
PLOTS = {
    "attempts",
    "loss",
    "throughput",
    "step-time",
    "communication",
    "bubble",
    "learning-rate",
    "gradient-norm",
    "memory",
}
EVIL = "<script>alert(1)</script>&\"' {{ 7*7 }} <img src=x onerror=alert(2)>"

# Of each plot: its size, its names, and the share of the width that the lines of a colour span.
LOOK = """
[...document.querySelectorAll('figure')].map(figure => {
  const svg = figure.querySelector('svg'), box = svg.getBoundingClientRect(), ends = {};
  for (const path of svg.querySelectorAll('path')) {
    const colour = /^var\\(--([abcd])\\)$/.exec(path.style.stroke);
    const part = path.getBoundingClientRect();
    if (!colour || path.closest('defs') || path.getTotalLength() < 10) continue;
    if (!getComputedStyle(path).stroke.startsWith('rgb')) continue;
    const [left, right] = ends[colour[1]] || [Infinity, -Infinity];
    ends[colour[1]] = [Math.min(left, part.left), Math.max(right, part.right)];
  }
  return {key: figure.id, width: box.width, height: box.height,
    spans: Object.fromEntries(Object.entries(ends).map(
      ([name, [left, right]]) => [name, (right - left) / box.width])),
    label: svg.getAttribute('aria-label'), title: svg.querySelector('title').textContent,
    texts: svg.querySelectorAll('text').length,
    lost: [...svg.querySelectorAll('use')].filter(
      use => !document.querySelector(use.href.baseVal)).length};
})
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Start one browser for all pages."""
    with open_browser() as browser:
        yield browser


def a_run(
    folder: Path, steps: int = 300, change: Callable[[dict[str, float]], object] = lambda line: None
) -> Path:
    """Make a run of four attempts in a pipeline: stopped, killed, failed, finished.

    `change` alters the line of a step.
    """
    chance = random.Random(1)
    folder.mkdir(parents=True)
    lines: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        seconds = 1.2 + 0.1 * chance.random()
        line: dict[str, float] = {
            "step": step,
            "loss": 2.3 + 6 * math.exp(-8 * step / steps) + 0.1 * chance.random(),
            "tokens": 4096 * step,
            "tokens_per_second": 4096 / seconds,
            "learning_rate": 3e-3 * (1 - step / (steps + 1)),
            "grad_norm": 0.4 + 0.1 * chance.random(),
            "step_seconds": seconds,
            "memory_bytes": 3 << 30,
            "bubble": 0.2,
            "data_seconds": 0.1 * seconds,
            "pipeline_seconds": 0.15 * seconds,
        }
        change(line)
        lines.append(line)
        if step % max(steps // 10, 1) == 0:
            lines.append({"step": step, "validation_loss": line["loss"]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.toml").write_text(
        f'[model]\nlayers = 2\n\n[train]\nrun = "x"\nsteps = {steps}\n'
    )
    (folder / "history.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in story(steps))
    )
    newest = folder / f"checkpoints/step-{steps:08d}"
    newest.mkdir(parents=True)
    (newest / "index.json").write_text("{}")
    return folder


def story(steps: int) -> list[dict[str, Any]]:
    start = {
        "ranks": 4,
        "hosts": {"n1": [0, 1], "n2": [2, 3]},
        "mesh": "data=2 × pipeline=2",
        "threads": 2,
        "steps": steps,
        "traffic": {"data": 1 << 20, "pipeline": 1 << 10},
        "parameters": 1_000_000,
        "mpi": "Open MPI 5.0.11",
        "versions": {"mpillm": "0.1.0", "torch": "2.9"},
        "job": {"scheduler": "slurm", "id": "12", "restart": 1},
    }
    part = steps // 4
    plan: list[tuple[int, str, int, dict[str, Any]]] = [
        (0, "started", 0, start),
        (5, "stopped", part, {"reason": "SIGUSR1 on rank 2"}),
        (9, "started", part, start),
        (12, "saved", 2 * part, {"checkpoint": "checkpoints/step-x", "seconds": 1.5}),
        (20, "started", 2 * part, start),
        (25, "failed", 3 * part, {"reason": "rank 3 of 4: the cable burnt"}),
        (30, "started", 3 * part, start),
        (40, "finished", steps, {}),
    ]
    noon = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
    return [
        {
            "event": name,
            "time": (noon + timedelta(minutes=minute)).isoformat(),
            "step": step,
            **facts,
        }
        for minute, name, step, facts in plan
    ]


class Reader(html.parser.HTMLParser):
    """What a page would load or run, its text, and the names of its parts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(page)
        self.links += re.findall(r"url\(([^)]*)\)|@import", page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in (
                "src",
                "srcset",
                "href",
                "xlink:href",
                "data",
                "action",
                "poster",
                "background",
            ):
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        self.text += data


def written(run: Path, out: Path | None = None) -> str:
    write_report(run, QUIET, out)
    return (out or run / "report.html").read_text(encoding="utf-8")


def drawn(page: str) -> set[str]:
    return set(re.findall(r'<figure id="([\w-]+)"', page))


def asks_nothing(page: str) -> None:
    found = Reader(page)
    assert [link for link in found.links if not link.startswith("#") and link != "data:,"] == []
    assert {"script", "iframe", "object", "embed", "img", "base", "form"}.isdisjoint(found.tags)
    assert found.handlers == []
    assert "default-src 'none'" in page
    assert len(found.ids) == len(set(found.ids))


def test_the_page_tells_the_story_of_a_run(tmp_path: Path) -> None:
    page = written(a_run(tmp_path / "run"))
    asks_nothing(page)
    text = re.sub(r"\s+", " ", Reader(page).text)
    for words in (
        "SIGUSR1 on rank 2",
        "no end on record",
        "rank 3 of 4: the cable burnt",
        "slurm 12, restart 1",
        "225 → 300",
        "n1",
        "data=2 × pipeline=2",
        "Open MPI 5.0.11",
        "checkpoints/step-00000300",
        "[model]",
        "layers",
        "Bytes of a rank and step, by formula: data 1.0 MiB, pipeline 1.0 KiB",
        "in 4 attempts",
    ):
        assert words in text, words
    assert drawn(page) == PLOTS
    labels = re.findall(
        r'<svg [^>]*role="img" aria-label="([^"]+)"[^>]*><title>([^<]+)</title>', page
    )
    assert len(labels) == len(PLOTS)
    assert all(label == title for label, title in labels)


def test_the_same_run_gives_the_same_pictures(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    one, other = (make_page(read_run(run, now=1e9)) for _ in range(2))
    assert one == other


def test_values_do_not_break_out_of_the_page(tmp_path: Path) -> None:
    run = a_run(tmp_path / "<b onload=x> & '\"")
    (run / "recipe.toml").write_text(
        f"[train]\nsteps = 300\n{json.dumps(EVIL)} = {json.dumps(EVIL)}\n"
    )
    events = story(300)
    events[1]["reason"] = events[0]["mesh"] = events[6]["versions"]["torch"] = EVIL
    events[6] |= {"hosts": {EVIL: [0]}, "mesh": EVIL, "mpi": EVIL}
    (run / "history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    page = written(run)
    asks_nothing(page)
    assert "<script>alert" not in page
    assert Reader(page).text.count(EVIL) >= 7
    assert str(escape(EVIL)) in page


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.update(loss=math.nan, grad_norm=math.inf) if line["step"] > 250 else None,
        lambda line: line.update(
            {key: math.nan for key in line if key not in ("step", "memory_bytes")}
        ),
        lambda line: line.update(
            loss=1e30 if line["step"] == 7 else 2.0, step_seconds=0.0, learning_rate=0.0
        ),
        lambda line: [
            line.pop(key)
            for key in ("memory_bytes", "bubble", "data_seconds")
            if line["step"] < 100
        ],
    ],
    ids=["diverged", "nothing finite", "a spike, and zeros", "begun by an older mpillm"],
)
def test_odd_numbers_are_drawn(
    tmp_path: Path, change: Callable[[dict[str, float]], object]
) -> None:
    run = a_run(tmp_path / "run", change=change)
    page = written(run)
    asks_nothing(page)
    assert drawn(page) == PLOTS
    lost = sum(
        not math.isfinite(line.get("loss", 0))
        for line in map(json.loads, (run / "metrics.jsonl").open())
    )
    assert (f"{lost} of 300 steps had no finite value" in page) == (lost > 0)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_of_hardly_any_steps(tmp_path: Path, steps: int) -> None:
    run = a_run(tmp_path / "run", steps)
    asks_nothing(written(run))
    for name in ("history.jsonl", "recipe.toml"):
        (run / name).unlink()
    page = written(run)
    asks_nothing(page)
    assert ("No step is done yet" in page) == (steps == 0)
    assert ("</svg>" in page) == (steps > 0)


def test_a_long_run_makes_a_small_file(tmp_path: Path) -> None:
    spike = 23_457

    def change(line: dict[str, float]) -> None:
        line["loss"] += 30.0 * (line["step"] == spike)

    standing = read_run(a_run(tmp_path / "run", 50_000, change))
    page = render_page(make_page(standing))
    assert drawn(page) == PLOTS
    assert len(page) < 3_000_000
    losses = curve(standing.steps["loss"])
    x, y = thin(np.arange(1.0, 50_001.0), losses)
    assert len(y) <= 2000
    assert x[np.argmax(y)] == spike
    assert y.max() == losses.max()


def test_where_it_is_written(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 3)
    assert "<h1>run</h1>" in written(run, tmp_path / "elsewhere.html")
    assert not (run / "report.html").exists()
    with pytest.raises(UsageError, match=r"cannot write .*nowhere.* --out"):
        write_report(run, QUIET, tmp_path / "nowhere/report.html")
    with pytest.raises(UsageError, match="there is no folder"):
        write_report(tmp_path / "none", QUIET)


def test_outputs_that_are_no_plain_files(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 3)
    write_report(run, QUIET, Path("/dev/null"))
    assert Path("/dev/null").is_char_device()
    (tmp_path / "link.html").symlink_to(tmp_path / "target.html")
    (tmp_path / "target.html").touch()
    write_report(run, QUIET, tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink()
    assert "<h1>run</h1>" in (tmp_path / "target.html").read_text()
    for out, reason in (
        ("/dev/full", "No space left on device"),
        (tmp_path, "it is a folder"),
        ("/", "it is a folder"),
        ("", "it is a folder"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(UsageError, match=f"cannot write .*: {reason}; name a file"):
            write_report(run, QUIET, Path(out))


def test_two_reports_of_one_run_at_once(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 3)
    with ThreadPoolExecutor(2) as pool:
        # Two pages that are written at the same time; drawing is not for several threads.
        page = render_page(make_page(read_run(run)))
        assert list(pool.map(lambda _: write_text(run / "report.html", page), range(20)))
    assert (run / "report.html").read_text(encoding="utf-8") == page
    assert not list(run.glob(".*"))


def test_damaged_logs_are_drawn_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'null\n3\n{"step": "x"}\n\xff\n\0\0\n{"step": 300, "loss": "\\ud800"}\n')
        file.write(b'{"step": 300, "loss": 1e308, "grad_norm": -1e308, "memory_bytes": 1e308}\n')
    with (run / "history.jsonl").open("ab") as file:
        odd = {"event": "started", "time": "2026-11-26T14:00:00Z", "step": 5, "job": {"id": []}}
        odd |= {"hosts": {"n": 4}, "ranks": 10**400, "parameters": "x", "versions": {"a\x1b": None}}
        odd |= {"traffic": {"data": 1e308, "x": "y"}, "reason": "\x1b[2J \ud800 \x00"}
        file.write(json.dumps(odd).encode() + b"\n[]\n")
    write_report(run, Console(), None)
    page = (run / "report.html").read_text(encoding="utf-8")
    asks_nothing(page)
    assert drawn(page) == PLOTS
    assert not set("\x00\x1b") & set(page)
    said = capsys.readouterr().out
    for words in (
        "6 lines of metrics.jsonl cannot be read",
        "1 line of history.jsonl cannot be read",
    ):
        assert words in page
        assert f"warning: {words}" in said


def test_flipped_bytes_are_drawn(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 40)
    chance = random.Random(5)
    for _ in range(4):
        for name in ("metrics.jsonl", "history.jsonl", "recipe.toml"):
            data = bytearray((run / name).read_bytes())
            for _ in range(10):
                data[chance.randrange(len(data))] = chance.randrange(256)
            (run / name).write_bytes(data)
        asks_nothing(written(run))


values = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=300)


@given(values, st.integers(4, 40))
def test_a_thinned_curve_keeps_its_extremes(y: list[float], most: int) -> None:
    x = np.arange(float(len(y)))
    thin_x, thin_y = thin(x, curve(y), most)
    assert len(thin_x) <= max(most, 4)
    assert (np.diff(thin_x) > 0).all()
    assert (thin_x[0], thin_x[-1]) == (0, len(y) - 1)
    np.testing.assert_array_equal(thin_y, curve(y)[thin_x.astype(int)])
    if np.isfinite(curve(y)).any():
        assert (np.nanmin(thin_y), np.nanmax(thin_y)) == (np.nanmin(curve(y)), np.nanmax(curve(y)))


def test_a_smooth_curve_follows_without_spikes_or_gaps() -> None:
    x = np.arange(1000.0)
    y = 100 - 0.05 * x
    flat = y.copy()
    y[500] = 9000.0
    y[600:610] = np.nan
    smooth_x, smooth_y = smooth(x, y)
    assert len(smooth_x) <= 500
    assert np.abs(smooth_y - flat[smooth_x.astype(int)]).max() < 0.6
    assert smooth_y[0] == flat[0]
    assert np.isnan(smooth(x, np.full(1000, np.nan))[1]).all()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_draws_every_plot_and_asks_no_network(
    chromium: Browser, tmp_path: Path, dark: bool
) -> None:
    path = a_run(tmp_path / EVIL.replace("/", "|")) / "report.html"
    write_report(path.parent, QUIET)
    scheme = "dark" if dark else "light"
    chromium.ask(
        "Emulation.setEmulatedMedia",
        features=[{"name": "prefers-color-scheme", "value": scheme}],
    )
    chromium.open(path.as_uri())
    plots = {plot["key"]: plot for plot in chromium.evaluate(LOOK)}
    paper = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    title = chromium.evaluate("document.title")
    chromium.ask(
        "Emulation.setDeviceMetricsOverride",
        width=400,
        height=800,
        deviceScaleFactor=1,
        mobile=False,
    )
    width = chromium.evaluate("document.documentElement.scrollWidth")
    pdf = chromium.ask("Page.printToPDF")["data"]
    chromium.ask("Runtime.evaluate", expression="0")
    asked = [request["request"]["url"] for request in chromium.named("Network.requestWillBeSent")]
    told = chromium.named("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert told == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert set(plots) == PLOTS
    for key, plot in plots.items():
        assert plot["width"] > 300, plot
        assert plot["height"] > 100, plot
        assert set(plot["spans"]) == ({"a", "b"} if key in ("loss", "communication") else {"a"}), (
            plot
        )
        assert all(0.7 < span < 1 for span in plot["spans"].values()), plot
        assert plot["label"] == plot["title"] != ""
        assert (plot["lost"], plot["texts"] > 4) == (0, True), plot
    assert paper == ("rgb(20, 23, 27)" if dark else "rgb(251, 250, 248)")
    assert title.startswith("<script>alert(1)<|script>")
    assert width <= 400
    assert len(pdf) > 10_000


def test_the_report_of_a_trained_run(
    documents: Path, folder: Path, mpillm: Callable[..., Any]
) -> None:
    data = folder / "data"
    options = PrepareOptions((str(documents),), data, tokenizer="bytes", validation=0.1)
    prepare(options, MPI.COMM_WORLD, QUIET)
    run, path = folder / "run", folder / "recipe.toml"
    path.write_text(
        "[model]\nlayers = 4\nwidth = 32\nheads = 2\ncontext = 32\n"
        f'[data]\npath = "{data}"\n[train]\nrun = "{run}"\nsteps = 12\nbatch = 8\nmicrobatch = 2\n'
        "evaluate_every = 6\nsave_every = 4\n[parallel]\npipeline = 2\n"
    )
    done = mpillm("train", path, ranks=2)
    assert done.returncode == 0, done.stderr
    page = make_page(read_run(run))
    assert {picture.key for picture in page.pictures} == PLOTS
    assert page.state == "finished"
    attempts = next(table for table in page.tables if table.title == "Attempts")
    assert [(row[3], row[4]) for row in attempts.rows] == [("finished", "0 → 12")]
    assert ("pipeline", "2") in page.recipe["parallel"]
    asks_nothing(written(run))
