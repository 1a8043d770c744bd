"""`evaluate --harness`: the figures that lm-eval's own back end gave, tables, JSON, and outputs.

recorded.json holds what lm-eval 0.4.13 computed by transformers from the same weights.
"""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.errors import MpillmError, UsageError
from mpillm.infer.harness.print_harness import HarnessOptions, print_harness
from mpillm.system.console import Console
from mpillm.verbs.evaluate import Evaluate
from tests.infer.harness.random_model import NAMES, RECORDED, TASKS, make_model

pytest.importorskip("yaml", reason="needs PyYAML: pip install 'mpillm[evaluate]'")
FILES = [TASKS / f"{name}.yaml" for name in NAMES]


@pytest.fixture(scope="module")
def model(shared_folder: Path, comm: MPI.Intracomm) -> Path:
    folder = shared_folder / "print_harness"
    if comm.rank == 0:
        folder.mkdir()
        make_model(folder)
    comm.Barrier()
    return folder / "model"


def printed(
    model: Path, comm: MPI.Intracomm, files: list[Path], twice: bool = False, **more: Any
) -> str:
    stream = StringIO()
    console = Console(speaks=comm.rank == 0, stream=stream, watched=False)
    models = [model, model] if twice else [model]
    print_harness(models, HarnessOptions(files, **more), comm, console, "cpu")
    return str(comm.bcast(stream.getvalue()))


def test_figures_are_those_of_lm_eval_at_any_number_of_ranks(
    model: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    outputs = folder / "together.jsonl"
    text = printed(model, comm, FILES, as_json=True, outputs=outputs)
    own = folder / f"alone-{comm.rank}.jsonl"
    assert printed(model, MPI.COMM_SELF, FILES, as_json=True, outputs=own) == text
    assert outputs.read_bytes() == own.read_bytes()
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    found = json.loads(text)["tasks"]
    rows = [json.loads(line) for line in outputs.read_text(encoding="utf-8").splitlines()]
    for name, wanted in recorded.items():
        check_figures(found[name], wanted)
        check_responses([row for row in rows if row["task"] == name], wanted["samples"])
    # Contexts of the test are longer than the model's.
    assert found["caps_self"]["cut"] > 0


def check_figures(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert set(found["model"]) == set(wanted["figures"])
    assert found["rows"] == len(wanted["samples"])
    for key, value in wanted["figures"].items():
        figure = found["model"][key]
        exact = key.startswith(("acc", "exact_match"))
        assert figure["value"] == pytest.approx(value, abs=1e-12 if exact else 0, rel=1e-3)
        if figure["interval"]:
            low, high = figure["interval"]
            assert low <= figure["value"] <= high


def check_responses(rows: list[dict[str, Any]], samples: list[dict[str, Any]]) -> None:
    assert [row["number"] for row in rows] == list(range(len(samples)))
    for row, sample in zip(rows, samples, strict=True):
        assert row["requests"] == sample["requests"]
        responses = sample["responses"]
        if "output" in row:
            assert [row["output"]] == responses
        elif "loglikelihood" in row:
            assert row["loglikelihood"] == pytest.approx(responses[0], abs=1e-3)
        else:
            assert row["loglikelihoods"] == pytest.approx([v for v, _ in responses], abs=1e-3)
            assert row["greedy"] == [greedy for _, greedy in responses]


def test_tables_compare_two_models_and_warn_of_cut_contexts(
    model: Path, comm: MPI.Intracomm
) -> None:
    text = printed(model, comm, FILES[-1:], limit=3)
    assert "table_mc" in text
    assert "with 95% intervals" in text
    assert "difference" not in text
    two = printed(model, comm, [TASKS / "caps_self.yaml"], twice=True, limit=9)
    assert "difference" in two
    assert "1.000" in two
    assert "longer than the model's context of 128 tokens: the left part is cut off" in two


def test_wrong_files_are_refused_on_every_rank(
    model: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    def refused(files: list[Path], **more: Any) -> str:
        with pytest.raises(MpillmError) as failure:
            printed(model, comm, files, **more)
        return str(failure.value)

    if comm.rank == 0:
        (folder / "mine").write_text("kept")
        (folder / "task.yaml").write_text("process_docs: !function utils.work\n")
    comm.Barrier()
    assert "has the tag !function (utils.work)" in refused([folder / "task.yaml"])
    assert "names two tasks 'caps_mc'" in refused([TASKS / "caps_mc.yaml"] * 2)
    assert "mine is there already" in refused(FILES[:1], outputs=folder / "mine")
    assert (folder / "mine").read_text() == "kept"


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"limit": 3}, "--limit is of --harness"),
        ({"harness": (Path("a"),), "data": Path("b")}, "--data is of prepared data"),
        ({"harness": (Path("a"),), "generate": True}, "--generate is of prepared data"),
        ({"harness": (Path("a"),), "max_tokens": 3}, "--max-tokens is of prepared data"),
    ],
)
def test_options_that_do_not_fit(given: dict[str, Any], rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        Evaluate(Path("run"), **given)
