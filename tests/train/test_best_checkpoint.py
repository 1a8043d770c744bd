"""The best checkpoint stays, and a run whose evaluations get no better ends, on all ranks alike."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.errors import RecipeError
from mpillm.infer.loading import load_trained
from mpillm.runs.report.run_report import make_page
from mpillm.runs.state import read_run
from mpillm.runs.status import print_status, run_figures
from mpillm.system.console import Console
from mpillm.tasks.metrics.metric_catalog import make_metrics
from mpillm.tasks.task_catalog import make_task
from mpillm.train.best_checkpoint import BestCheckpoint, recorded_metrics
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train
from mpillm.weights.places import best_checkpoint
from mpillm.weights.saving import mark_best

QUIET = Console(speaks=False)
KEPT = {"evaluate_every": 2, "save_every": 3, "keep": 1, "early_stopping_patience": 3}


def recipe(data: Path, run: Path, **settings: Any) -> Recipe:
    table: dict[str, Any] = {
        "model": {"layers": 1, "width": 16, "heads": 2, "hidden": 32, "context": 32},
        # So large a rate that the loss falls first and rises then.
        "optimizer": {
            "learning_rate": 0.3,
            "warmup_steps": 6,
            "schedule": "constant-then-decay",
            "decay_share": 0.0,
        },
        "data": {"path": str(data)},
        "train": {"run": str(run), "sinks": [], "steps": 40, "batch": 12},
    }
    table["train"] |= {**KEPT, **settings}
    return parse_recipe(table, "r")


def evaluations(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]


def kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_an_early_stop_leaves_the_best_checkpoint_and_a_resume_is_exact(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    said = io.StringIO()
    whole, parts = folder / "whole", folder / "parts"
    train(recipe(data, whole), comm, Console(stream=said, speaks=comm.rank == 0))
    comm.Barrier()
    found = evaluations(whole)
    best, value = min(found, key=lambda each: each[1])
    # The run ended at the third evaluation after the best one.
    assert [step for step, _ in found][-4:] == [best, best + 2, best + 4, best + 6]
    assert 2 < best < 30
    assert kept(whole) == sorted({"best", f"step-{best:08d}", f"step-{best + 6:08d}"})
    assert best_checkpoint(whole / "checkpoints") == whole / f"checkpoints/step-{best:08d}"
    if comm.rank == 0:
        text = " ".join(said.getvalue().split())
        assert "finished (stopped early: 3 evaluations in a row had no better" in text
        assert f"the best checkpoint: {whole}/checkpoints/step-{best:08d}, validation loss" in text
        assert (whole / "outcome").read_text() == "finished\n"
    # Interrupted at the best evaluation, and between it and the end.
    for steps in (best, best + 4, 40):
        resume = comm.bcast(parts.exists())
        train(recipe(data, parts, steps=steps), comm, QUIET, resume=resume)
        comm.Barrier()
    assert evaluations(parts) == found
    assert kept(parts) == kept(whole)
    # Nothing is left to do, until more patience is asked for.
    train(recipe(data, parts), comm, Console(stream=said, speaks=comm.rank == 0), resume=True)
    assert evaluations(parts) == found
    if comm.rank == 0:
        assert "raise train.early_stopping_patience to continue" in " ".join(
            said.getvalue().split()
        )
    train(recipe(data, parts, early_stopping_patience=4), comm, QUIET, resume=True)
    assert evaluations(parts)[: len(found)] == found
    assert len(evaluations(parts)) > len(found)
    # What was the best before is gone: the best and the newest one stay.
    later = min(evaluations(parts), key=lambda each: each[1])[0]
    steps = {later, evaluations(parts)[-1][0]}
    assert kept(parts) == sorted({"best", *(f"step-{step:08d}" for step in steps)})
    loaded = load_trained(whole / "checkpoints/best", comm, QUIET)
    assert loaded.checkpoint.step == best
    if comm.rank == 0:
        state = read_run(whole)
        assert run_figures(state)["best_checkpoint"] == {
            "path": f"{whole}/checkpoints/step-{best:08d}",
            "step": best,
            "metric": "validation_loss",
            "value": pytest.approx(value),
        }
        shown = io.StringIO()
        print_status(whole, Console(stream=shown))
        assert "best checkpoint" in shown.getvalue()
        assert "checkpoints/best" in shown.getvalue().split("next:")[1]
        assert any(figure.label == "best validation loss" for figure in make_page(state).figures)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"early_stopping_patience": 0}, "early_stopping_patience = 0: .* greater than 0"),
        ({"evaluate_every": 0}, "evaluate_every = 0 makes one at the end; set evaluate_every"),
        ({"keep_best": "validation_accuracy"}, "the task causal-lm, which gives validation_loss$"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_the_run_has_a_folder(
    settings: dict[str, Any], words: str, data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    with pytest.raises(RecipeError, match=words):
        train(recipe(data, folder / "run", **settings), comm, QUIET)
    assert not (folder / "run").exists()


def test_data_without_a_validation_split_has_no_best_checkpoint(data: Path) -> None:
    settings = recipe(data, Path("run")).train
    with pytest.raises(RecipeError, match=r"the data has no validation split; .*--validation"):
        BestCheckpoint(settings, make_task("causal-lm"), validates=False)
    # Without the settings none is asked for.
    plain = replace(settings, early_stopping_patience="none")
    assert BestCheckpoint(plain, make_task("causal-lm"), validates=False).stops == ""


def test_the_direction_of_each_number_is_its_metrics() -> None:
    names = ["loss", "perplexity", "accuracy", "macro-f1", "ece", "confusion-matrix", "mse"]
    assert recorded_metrics(make_metrics(names, ("a", "b"))) == {
        "validation_loss": True,
        "validation_accuracy": False,
        "validation_macro_f1": False,
        "validation_ece": True,
        "validation_mse": True,
    }
    settings = parse_recipe(
        {
            "data": {"path": "d"},
            "train": {"keep_best": "validation_accuracy", "evaluate_every": 1}
            | {"early_stopping_patience": 2},
        },
        "r",
    ).train
    best = BestCheckpoint(settings, make_task("sequence-classification"), validates=True)
    lines = [{"step": n, "validation_accuracy": v} for n, v in enumerate((0.5, 0.7, 0.7), 1)]
    assert [best.add(line) for line in lines] == [True, True, False]
    assert best.stops == ""
    # A value that is missing, such as one that was not finite, is no better.
    assert not best.add({"step": 4})
    assert best.stops.endswith("no better validation_accuracy than 0.7000 at step 2")


def test_the_link_is_ours_alone(tmp_path: Path) -> None:
    (tmp_path / "step-00000004").mkdir()
    mark_best(tmp_path, 4)
    assert best_checkpoint(tmp_path) == tmp_path / "step-00000004"
    mark_best(tmp_path, 8)
    assert best_checkpoint(tmp_path) is None
    (tmp_path / "best").mkdir()
    with pytest.raises(FileExistsError, match="move it away"):
        mark_best(tmp_path, 4)
    assert best_checkpoint(tmp_path) is None
