"""Metrics and their sinks: each one alone, missing packages, and a sink of one's own."""

import errno
import io
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from mpillm.errors import UsageError
from mpillm.runs.folder import EVENTS, METRICS, PICTURE
from mpillm.runs.metrics import (
    Metrics,
    MetricsSink,
    MetricsWriter,
    read_metrics,
    read_metrics_log,
)
from mpillm.runs.sink_catalog import SINKS
from mpillm.runs.sinks.tensorboard_events import TensorBoardSink
from mpillm.system.console import Console
from mpillm.system.plugins import load_plugin

STEPS: list[Metrics] = [{"step": step, "loss": 5.0 - step} for step in (1, 2, 3)]


class ListSink(MetricsSink):
    """A sink of a user's own, named as a plug-in."""

    def open(self, run: Path, last_step: int) -> None:
        self.path = run / f"from-{last_step}"
        self.steps: list[float] = []

    def add(self, metrics: Metrics) -> None:
        self.steps.append(metrics["step"])

    def close(self) -> None:
        self.path.write_text(json.dumps(self.steps))


class BrokenSink(ListSink):
    def close(self) -> None:
        raise OSError("disk is gone")


class FullSink(ListSink):
    """A sink whose disk is full from the second step on."""

    def add(self, metrics: Metrics) -> None:
        if metrics["step"] > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        super().add(metrics)


class NeverOpenSink(ListSink):
    def open(self, run: Path, last_step: int) -> None:
        raise RuntimeError("no such service")


def write(run: Path, last_step: int = 0, console: Console | None = None, **more: object) -> None:
    writer = MetricsWriter(run, last_step, True, console, **more)  # type: ignore[arg-type]
    for metrics in STEPS:
        writer.add(metrics)
    writer.close()


def test_each_sink_of_the_catalogue_writes_its_file(tmp_path: Path) -> None:
    write(tmp_path)
    assert list(read_metrics(tmp_path / METRICS)) == STEPS
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / EVENTS).glob("events.out.*"))) == 1
    assert all(issubclass(load_plugin(name, SINKS, "sink"), MetricsSink) for name in SINKS)


def test_ranks_other_than_0_write_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, writes=False)
    writer.add(STEPS[0])
    writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "sink", "file"),
    [("tensorboard", "TensorBoard", EVENTS), ("matplotlib", "loss.png", PICTURE)],
)
def test_a_missing_package_costs_its_sink_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, sink: str, file: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)

    class Missing:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    out = io.StringIO()
    write(tmp_path, console=Console(stream=out))
    (line,) = out.getvalue().splitlines()
    assert line.startswith(f"warning: {sink} is not written: No module named '{package}")
    assert line.endswith("pip install 'mpillm[train]'")
    assert list(read_metrics(tmp_path / METRICS)) == STEPS
    assert not (tmp_path / file).exists()


def test_an_earlier_attempts_steps_beyond_the_checkpoint_are_removed(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, last_step=1)
    assert [line["step"] for line in read_metrics(tmp_path / METRICS)] == [1, 1, 2, 3]


def test_a_sink_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path, last_step=7, sinks=[f"{__name__}:ListSink"])
    assert json.loads((tmp_path / "from-7").read_text()) == [1, 2, 3]
    with pytest.raises(
        UsageError, match=r"no metrics sink is called 'loss\.pgn', did you mean loss"
    ):
        MetricsWriter(tmp_path, 0, True, sinks=["loss.pgn"])


def test_every_sink_is_closed_where_one_fails(tmp_path: Path) -> None:
    out = io.StringIO()
    sinks = [f"{__name__}:BrokenSink", f"{__name__}:ListSink"]
    write(tmp_path, console=Console(stream=out), sinks=sinks)
    assert "BrokenSink is not written from here on: disk is gone" in out.getvalue()
    assert (tmp_path / "from-0").exists()


def test_a_sink_that_fails_is_reported_once_and_ends_nothing(tmp_path: Path) -> None:
    out = io.StringIO()
    names = ["FullSink", "NeverOpenSink"]
    sinks = [*(f"{__name__}:{name}" for name in names), "metrics.jsonl"]
    write(tmp_path, console=Console(stream=out), sinks=sinks)
    assert list(read_metrics(tmp_path / METRICS)) == STEPS
    never, full = out.getvalue().splitlines()
    assert "NeverOpenSink is not written from here on: RuntimeError: no such" in never
    assert "FullSink is not written from here on" in full
    assert "No space left on device; free some space" in full


@pytest.mark.parametrize("name", [PICTURE, EVENTS])
def test_a_picture_and_events_never_end_a_run(tmp_path: Path, name: str) -> None:
    if name == PICTURE:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("a file in place of the folder")
    out = io.StringIO()
    write(tmp_path, console=Console(stream=out))
    assert list(read_metrics(tmp_path / METRICS)) == STEPS
    (line,) = out.getvalue().splitlines()
    assert "is not written from here on: " in line


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "device"])
def test_metrics_that_cannot_be_written_are_refused_at_the_start(tmp_path: Path, kind: str) -> None:
    path = tmp_path / METRICS
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/full" if kind == "device" else tmp_path / "none/where")
    with pytest.raises(UsageError, match=r"cannot write .*metrics"):
        write(tmp_path)
    assert path.is_symlink() or not path.is_file()


DAMAGE = [
    b"null\n", b"3\n", b"{}\n", b"[]\n", b'{"step": null}\n', b'{"loss": 1.0}\n', b"\xff\xfe\n",
    b"\0" * 512 + b"\n", b'{"step": -1}\n', b'{"step": 2.5}\n', b'{"step": true}\n', b'{"step": 9',
    b"x" * 10_000_000 + b"\n", b'{"step": ' + b"9" * 5000 + b"}\n",
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=[repr(line[:12]) for line in DAMAGE])
def test_a_damaged_line_is_counted_and_kept_aside_on_resume(tmp_path: Path, damage: bytes) -> None:
    write(tmp_path, sinks=["metrics.jsonl"])
    path = tmp_path / METRICS
    before = path.read_bytes() + damage
    path.write_bytes(before)
    log = read_metrics_log(path)
    assert (list(log.objects), log.faults) == (STEPS, 1)
    for number, count in ((1, 1), (2, 0)):
        out = io.StringIO()
        MetricsWriter(tmp_path, 3, True, Console(stream=out), ["metrics.jsonl"]).close()
        kept = path.with_name(f"{METRICS}.damaged-{number}")
        assert kept.exists() == bool(count)
        assert ("1 line of" in out.getvalue()) == bool(count)
    assert path.with_name(f"{METRICS}.damaged-1").read_bytes() == before
    assert list(read_metrics(path)) == STEPS


def test_numbers_of_metrics_are_read_as_far_as_they_can_be(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text(
        '{"step": "1", "loss": "2.5"}\n{"step": 2, "loss": null}\n{"step": 3, "loss": NaN}\n'
        '{"step": 4, "loss": [1]}\n{"step": 5, "loss": 1e999}\n'
    )
    log = read_metrics_log(path)
    assert [line["step"] for line in log.objects] == [1, 2, 3, 4, 5]
    assert log.objects[0] == {"step": 1, "loss": 2.5}
    assert [math.isnan(line["loss"]) for line in log.objects[1:3]] == [True, True]
    assert "loss" not in log.objects[3]
    assert log.faults == 1


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([1, 2, 3, 3, 4], [1, 2, 3, 3, 4]),
        # A digit too many, and one too few.
        ([1, 2, 300, 3, 4], [1, 2, 3, 4]),
        ([1, 20, 21, 2, 22], [1, 20, 21, 22]),
        # An attempt that began again at step 3, where the file was not cut.
        ([1, 2, 3, 4, 3, 4, 5, 6], [1, 2, 3, 3, 4, 5, 6]),
        ([9, 1, 2], [1, 2]),
        ([], []),
    ],
)
def test_steps_that_go_back_are_left_out(tmp_path: Path, steps: list[int], kept: list[int]) -> None:
    path = tmp_path / METRICS
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
    log = read_metrics_log(path)
    assert [line["step"] for line in log.objects] == kept
    assert log.faults == len(steps) - len(kept)


def test_no_line_holds_what_json_has_not(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, True, sinks=["metrics.jsonl"])
    writer.add({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    writer.close()
    assert (tmp_path / METRICS).read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'
    (line,) = read_metrics(tmp_path / METRICS)
    assert math.isnan(line["loss"])


def test_metrics_are_tried_again_after_a_full_disk(tmp_path: Path) -> None:
    """A limit on file sizes makes a write fail within a line; later it is lifted."""
    out = io.StringIO()
    writer = MetricsWriter(tmp_path, 0, True, Console(stream=out), ["metrics.jsonl"])
    writer.add({"step": 1, "loss": 1.0})
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.SIG_IGN
    handler = signal.signal(signal.SIGXFSZ, ignored)
    try:
        size = (tmp_path / METRICS).stat().st_size + 5
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        for step in (2, 3):
            writer.add({"step": step, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    writer.add({"step": 4, "loss": 1.0})
    writer.close()
    log = read_metrics_log(tmp_path / METRICS)
    assert [line["step"] for line in log.objects] == [1, 2, 3, 4]
    assert log.faults == 0
    assert out.getvalue().count("warning:") == 1
    assert "each step tries again" in " ".join(out.getvalue().split())


def test_tensorboard_reads_what_two_attempts_wrote(tmp_path: Path) -> None:
    """The second begins at step 3: its values replace those of the first from there on."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    threads = threading.active_count()
    for last_step, values in ((0, [3.0, 2.0, 1.5]), (2, [1.0, 0.5])):
        sink = TensorBoardSink()
        sink.open(tmp_path, last_step)
        for step, loss in enumerate(values, last_step + 1):
            sink.add({"step": step, "loss": loss})
        # A thread would print a traceback of its own where the disk is full.
        assert threading.active_count() == threads
        sink.close()
        time.sleep(1.1)  # the names of the files have seconds
    events = accumulator.EventAccumulator(str(tmp_path / EVENTS))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]
