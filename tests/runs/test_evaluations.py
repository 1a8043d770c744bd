"""Evaluations in a run's folder, from `mpillm evaluate` to the page of `mpillm report`."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from mpillm.infer.print_evaluation import print_evaluation
from mpillm.runs.evaluations import read_evaluations, record_evaluation
from mpillm.runs.folder import EVALUATIONS
from mpillm.runs.report.evaluation_figures import evaluation_tables, reliability_picture
from mpillm.runs.report.page import render_page
from mpillm.runs.report.run_report import make_page
from mpillm.runs.state import read_run
from mpillm.system.console import Console
from mpillm.tasks.metrics.calibration import CalibrationError, Reliability
from mpillm.tasks.metrics.metric import Totals
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.train.recipe import parse_recipe
from mpillm.train.setup import train

QUIET = Console(speaks=False)
METRICS = ("accuracy", "confusion-matrix", "ece", "reliability")
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def classifier(shared_folder: Path, comm: MPI.Intracomm) -> Path:
    """Train a classifier of texts for a few steps."""
    folder = shared_folder / "evaluations"
    if comm.rank == 0:
        folder.mkdir()
        labels = "good", EVIL
        rows = [{"text": "ab"[n % 2] * (3 + n % 5), "label": labels[n % 2]} for n in range(90)]
        (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    comm.Barrier()
    source, task = (str(folder / "texts.jsonl"),), "sequence-classification"
    options = PrepareOptions(source, folder / "d", tokenizer="bytes", validation=0.4, task=task)
    prepare(options, comm, QUIET)
    table = {
        "model": {"shape": "bert-tiny-classes", "context": 16},
        "data": {"path": str(folder / "d")},
        "task": {"name": task},
        "train": {"run": str(folder / "run"), "sinks": [], "steps": 2, "batch": 12},
    }
    train(parse_recipe(table, "test"), comm, QUIET)
    return folder / "run"


def test_an_evaluation_is_on_the_page(classifier: Path, comm: MPI.Intracomm) -> None:
    said = io.StringIO()
    console = Console(stream=said, speaks=comm.rank == 0)
    given = classifier, None, False, True, comm, console, METRICS, "cpu"
    print_evaluation(*given)
    print_evaluation(classifier, None, False, False, comm, console, ("loss",), "cpu")
    comm.Barrier()
    if comm.rank:
        return
    facts = json.loads(said.getvalue().partition("\n")[0])["model"]
    found, damage = read_evaluations(classifier)
    assert not damage
    assert len(found) == 2
    score = found[0].scores["model"]
    assert score.values["accuracy"] == facts["accuracy"]
    assert list(score.intervals["ece"]) == facts["intervals"]["ece"]
    assert score.tables["confusion-matrix"] == facts["confusion_matrix"]
    assert sum(row[1] for row in score.tables["reliability"]) == facts["rows"]
    assert found[1].scores["model"].values.keys() == {"loss"}
    assert found[0].step == 2
    text = render_page(make_page(read_run(classifier)))
    assert "Confusion matrix" in text
    assert 'id="reliability"' in text
    assert f"{facts['accuracy']:,.4f}" in text
    assert f"ECE, is {facts['ece']:.4f}" in text
    # A class is a text of the data's author.
    assert EVIL not in text
    assert not re.search(r"(?:src|href)=.http", text)


def test_another_users_run_is_evaluated_without_a_record(
    classifier: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpillm.infer.candidates.is_recorded", lambda run: False)
    before = (classifier / EVALUATIONS).read_bytes() if comm.rank == 0 else b""
    print_evaluation(classifier, None, False, True, comm, QUIET, ("loss",), "cpu")
    if comm.rank == 0:
        assert (classifier / EVALUATIONS).read_bytes() == before


def test_the_bins_are_those_of_the_calibration_error() -> None:
    chance = np.random.default_rng(2)
    logits, targets = chance.normal(size=(500, 4)) * 2, chance.integers(0, 4, 500)
    sums = CalibrationError().of_rows([logits], {"targets": targets}).sum(0)
    rows = Reliability().table(sums)
    ece = CalibrationError().value(sums, Totals(0.0, 500.0, 0))
    assert sum(n * abs(right - p) for _, n, p, right in rows) / 500 == pytest.approx(ece)
    assert all(edge - 1 / 15 < p <= edge + 1e-12 for edge, _, p, _ in rows)
    assert sum(row[1] for row in rows) == 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "values", "tables", "reliability", "a"]), inner)
    ),
    max_leaves=12,
)


@pytest.mark.usefixtures("processes")
@given(
    st.dictionaries(
        st.sampled_from(["time", "step", "classes", "scores", "data"]),
        JSON | st.fixed_dictionaries({"model": st.fixed_dictionaries({"tables": JSON})}),
    )
)
@settings(max_examples=60, deadline=None)
def test_damage_never_fails(tmp_path_factory: pytest.TempPathFactory, facts: dict) -> None:  # type: ignore[type-arg]
    run = tmp_path_factory.mktemp("run")
    record_evaluation(run, facts)
    with (run / EVALUATIONS).open("ab") as file:
        file.write(b'{"torn": \n')
    found, damage = read_evaluations(run)
    assert "1 line" in damage
    evaluation_tables(found)
    reliability_picture(found)


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    (tmp_path / EVALUATIONS).write_bytes(b'{"step": 1}\n{"step": 2, "sco')
    record_evaluation(tmp_path, {"step": 3})
    record_evaluation(tmp_path, {"step": 4})
    found, damage = read_evaluations(tmp_path)
    assert [each.step for each in found] == [1, 3, 4]
    assert "1 line" in damage
