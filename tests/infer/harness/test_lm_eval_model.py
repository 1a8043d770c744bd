"""lm-eval itself: it drives the ranks, and its own back end gives the figures of --harness."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.errors import UsageError
from mpillm.infer.export_model import export_model
from mpillm.infer.harness.harness_model import open_model_for_harness
from mpillm.infer.harness.print_harness import HarnessOptions, print_harness
from mpillm.infer.import_model import import_model
from mpillm.system.console import Console
from mpillm.verbs.lm_eval import LmEval
from tests.infer.harness.random_model import (
    NAMES,
    RECORDED,
    TASKS,
    figures_of_lm_eval,
    make_model,
    plain,
)
from tests.pretrained import smollm2

NEEDED = "needs lm-eval: pip install 'mpillm[lm-eval]'"
QUIET = Console(speaks=False)
SOME = [name for name in NAMES if name in ("caps_self", "caps_gen", "long_roll", "table_mc")]


def test_its_options_are_needed() -> None:
    with pytest.raises(UsageError, match="needs the options of lm-eval after `--`"):
        LmEval(Path("run"))


@pytest.fixture
def in_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder where the paths of the data files begin, for the harness."""
    monkeypatch.chdir(TASKS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def model(folder: Path, comm: MPI.Intracomm) -> Path:
    if comm.rank == 0:
        make_model(folder)
    comm.Barrier()
    return folder / "model"


def test_the_harness_drives_all_ranks(model: Path, comm: MPI.Intracomm, in_tasks: None) -> None:
    """Rank 0 runs it, the others serve; its figures are those that its own back end gave."""
    lm_eval = pytest.importorskip("lm_eval", reason=NEEDED)
    from lm_eval.tasks import TaskManager

    from mpillm.infer.harness.lm_eval_model import RanksLM, serve

    opened = open_model_for_harness(model, comm, QUIET, "cpu")
    if comm.rank:
        serve(opened)
        return
    lm = RanksLM(opened)
    known = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=lm, tasks=SOME, task_manager=known, bootstrap_iters=0, log_samples=True
    )
    lm.stop()
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    for name in SOME:
        ours = plain(found["results"][name], found["samples"][name])
        assert ours["figures"] == pytest.approx(recorded[name]["figures"], rel=1e-3)
        for one, other in zip(ours["samples"], recorded[name]["samples"], strict=True):
            assert one["requests"] == other["requests"]
            _check(one["responses"], other["responses"])
    assert found["config"]["mpillm_ranks"] == comm.size


def _check(ours: list[Any], theirs: list[Any]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, tuple | list):
            assert one[0] == pytest.approx(other[0], abs=1e-3)
            assert one[1] == other[1]
        else:
            assert one == (pytest.approx(other, abs=1e-3) if isinstance(other, float) else other)


def test_a_request_that_fails_ends_all_ranks(model: Path, comm: MPI.Intracomm) -> None:
    pytest.importorskip("lm_eval", reason=NEEDED)
    from mpillm.infer.harness.lm_eval_model import drive

    opened = open_model_for_harness(model, comm, QUIET, "cpu")
    with pytest.raises(UsageError, match="--model is of lm-eval's other models"):
        drive(opened, ["--tasks", "x", "--model", "hf"])


@pytest.mark.slow("lm-eval and transformers score 135 million weights")
def test_figures_of_smollm2_are_those_of_its_own_back_end(tmp_path: Path, in_tasks: None) -> None:
    pytest.importorskip("lm_eval", reason=NEEDED)
    import_model(smollm2(), tmp_path / "model", MPI.COMM_SELF, QUIET)
    export_model(tmp_path / "model", tmp_path / "hf", "hf", "float32", MPI.COMM_SELF, QUIET)
    theirs = figures_of_lm_eval(tmp_path / "hf", NAMES)
    stream = StringIO()
    files = [TASKS / f"{name}.yaml" for name in NAMES]
    options = HarnessOptions(files, outputs=tmp_path / "out", as_json=True)
    print_harness([tmp_path / "model"], options, MPI.COMM_SELF, Console(stream=stream), "cpu")
    ours = json.loads(stream.getvalue())["tasks"]
    _check_chat_template(tmp_path)
    from tests.infer.harness.test_print_harness import check_figures, check_responses

    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    for name, wanted in theirs.items():
        check_figures(ours[name], wanted)
        check_responses([row for row in rows if row["task"] == name], wanted["samples"])


def _check_chat_template(folder: Path) -> None:
    """Compare the text of turns with that of transformers."""
    from transformers import AutoTokenizer

    from mpillm.infer.harness.lm_eval_model import RanksLM

    lm = RanksLM(open_model_for_harness(folder / "model", MPI.COMM_SELF, QUIET, "cpu"))
    theirs = AutoTokenizer.from_pretrained(folder / "hf")
    turns = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "It is"}]
    for asked, prompt in ((turns[:1], True), (turns, False)):
        wanted = theirs.apply_chat_template(
            asked,
            tokenize=False,
            add_generation_prompt=prompt,
            continue_final_message=not prompt,
        )
        assert lm.apply_chat_template(asked, prompt) == wanted
    assert lm.chat_template(True)
