"""Run folders that earlier versions wrote: status, report and the lock still read them."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest

from mpillm.runs.folder import LOCK, METRICS, OUTCOME
from mpillm.runs.history import HistoryWriter, last_save_seconds
from mpillm.runs.lock import Holder, RunLock, find_hold
from mpillm.runs.metrics import MetricsWriter, read_metrics
from mpillm.runs.report.run_report import write_report
from mpillm.runs.state import read_run
from mpillm.runs.status import print_status
from mpillm.system.console import Console

# Two attempts of 12 and 2 steps by version 0.1.0, with the lock that the first one held; only one
# checkpoint, without its arrays, was kept.
OLD_RUN = Path(__file__).parent / "data_0_1" / "run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(OLD_RUN, folder)
    # A checkout gives every file the present time, by which the lock would be fresh.
    os.utime(folder / LOCK, (0, 0))
    return folder


def test_the_state_of_a_run_by_version_0_1(run: Path) -> None:
    state = read_run(run)
    assert (state.state, state.step, state.goal, state.holder) == ("finished", 14, 14, "")
    assert [(a.how, a.first_step, a.last_step) for a in state.attempts] == [
        ("finished", 0, 12),
        ("finished", 12, 14),
    ]
    first, last = state.attempts
    assert (first.hosts, first.job["id"], last.job["id"]) == ({"n1": [0]}, "4242", "4243")
    assert [event.step for event in first.saved] == [5, 10, 12]
    assert [kept.step for kept in state.checkpoints] == [14]
    assert list(state.evaluations["step"]) == [6, 12, 14]
    assert (state.job["scheduler"], state.job["id"]) == ("slurm", "4242")
    assert last_save_seconds(run) == last.saved[-1].facts["seconds"]
    assert (run / OUTCOME).read_text() == "finished\n"


def test_status_and_report_of_a_run_by_version_0_1(run: Path) -> None:
    out = io.StringIO()
    print_status(run, Console(stream=out), as_json=True)
    figures = json.loads(out.getvalue())
    assert (figures["state"], figures["step"], figures["loss"]) == (
        "finished",
        14,
        pytest.approx(5.5184, abs=1e-4),
    )
    write_report(run, Console(speaks=False))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 7
    assert "slurm 4243" in page


def test_the_lock_of_a_run_by_version_0_1(run: Path) -> None:
    holder = Holder.from_json(json.loads((run / LOCK).read_text()))
    assert holder is not None
    assert (holder.host, holder.job and holder.job.id) == ("n1", "4242")
    assert find_hold(run) is None
    RunLock(run, None).release()
    os.utime(shutil.copy(OLD_RUN / LOCK, run / LOCK))
    hold = find_hold(run)
    assert hold is not None
    assert hold.holder == holder


def test_a_run_by_version_0_1_goes_on(run: Path) -> None:
    before = list(read_metrics(run / METRICS))
    writer = MetricsWriter(run, 12, writes=True, sinks=["metrics.jsonl"])
    writer.add({"step": 13, "loss": 5.0})
    writer.close()
    kept = [line for line in before if line["step"] <= 12]
    assert list(read_metrics(run / METRICS)) == [*kept, {"step": 13, "loss": 5.0}]
    history = HistoryWriter(run, writes=True)
    history.started(12, {"ranks": 1})
    history.ended("stopped", 13, "the time limit is near")
    assert [attempt.how for attempt in read_run(run).attempts] == [
        "finished",
        "finished",
        "stopped",
    ]
