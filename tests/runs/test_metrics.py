"""Metrics and their sinks: each one alone, missing packages, and a sink of one's own."""

import io
import json
import sys
from pathlib import Path

import pytest

from mpillm.errors import UsageError
from mpillm.runs.folder import EVENTS, METRICS, PICTURE
from mpillm.runs.metrics import Metrics, MetricsSink, MetricsWriter, read_metrics
from mpillm.runs.sink_catalog import SINKS
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
    with pytest.raises(OSError, match="disk is gone"):
        write(tmp_path, sinks=[f"{__name__}:BrokenSink", f"{__name__}:ListSink"])
    assert (tmp_path / "from-0").exists()
