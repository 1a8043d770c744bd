"""All folds and seeds in one job: the parts of the data, a resume, and what is refused."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.errors import DataError, MismatchError, RecipeError, UsageError
from mpillm.runs.metrics import read_metrics
from mpillm.system.console import Console
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.pairs.pair_manifest import PairManifest
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.prepare import PrepareOptions, prepare_folds
from mpillm.tokens.split import plan_fold
from mpillm.train.folds.fold_runs import SUMMARY, is_finished, plan_runs, train_runs
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train

QUIET = Console(speaks=False)
TASK = "sequence-classification"


@pytest.fixture(scope="module")
def folds(shared_folder: Path, comm: MPI.Intracomm) -> Path:
    """Prepare three folds of 62 texts, two of which are equal."""
    folder = shared_folder / "folds"
    if comm.rank == 0:
        folder.mkdir()
        rows = [{"text": f"{'ab'[n % 2] * 4}{n % 61}", "label": "xy"[n % 2]} for n in range(61)]
        rows.append(rows[0])
        (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    comm.Barrier()
    source = (str(folder / "texts.jsonl"),)
    options = PrepareOptions(source, folder / "data", tokenizer="bytes", folds=3, task=TASK)
    prepare_folds(options, comm, QUIET)
    return folder


def texts_of(folder: Path, split: str) -> list[bytes]:
    manifest = Manifest.load(folder)
    assert isinstance(manifest, PairManifest)
    with PairReader(manifest, split) as reader:
        return [bytes(reader.sides(n)[0].astype(np.uint8)) for n in range(reader.n_pairs)]


def test_each_document_is_held_out_once(folds: Path, comm: MPI.Intracomm) -> None:
    held_out: list[bytes] = []
    for fold in (1, 2, 3):
        tested, learnt = (
            texts_of(folds / f"data/fold-{fold}", name) for name in ("validation", "train")
        )
        assert len(tested) + len(learnt) == 62
        # Equal texts are in one split.
        assert not set(tested) & set(learnt)
        assert 20 <= len(tested) <= 22
        held_out += tested
    assert len(held_out) == 62
    assert len(set(held_out)) == 61


def test_folds_are_the_same_at_any_number_of_ranks(comm: MPI.Intracomm) -> None:
    keys = np.random.default_rng(2).integers(0, 1 << 62, 200).astype(np.uint64)
    parts = []
    for fold in range(1, 8):
        plan = plan_fold(keys[comm.rank :: comm.size], fold, 7, comm)
        alone = plan_fold(keys, fold, 7, MPI.COMM_SELF)
        assert plan.of(keys).tolist() == alone.of(keys).tolist()
        parts.append(plan.of(keys))
    assert (np.sum(parts, axis=0) == 1).all()
    with pytest.raises(UsageError, match=r"--folds 201 needs as many .* there are 200; lower"):
        plan_fold(keys[comm.rank :: comm.size], 1, 201, comm)


def recipe_of(folds: Path, run: Path, steps: int = 2) -> Recipe:
    table = {
        "model": {"shape": "bert-tiny-classes", "context": 12},
        "data": {"path": str(folds / "data")},
        "task": {"name": TASK},
        "train": {"run": str(run), "sinks": [], "steps": steps, "batch": 12},
    }
    return parse_recipe(table, "test")


def test_the_runs_of_all_folds_and_what_they_say(
    folds: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    recipe, trained = recipe_of(folds, folder / "run"), []

    def train_one(each: Recipe) -> None:
        trained.append(each.train.run)
        train(each, comm, QUIET)
        # The job ends after its second run.
        if len(trained) == 2:
            raise MismatchError("the end of the job")

    runs = plan_runs(recipe, True, 1)
    assert [each.folder.name for each in runs] == ["fold-1", "fold-2", "fold-3"]
    said = io.StringIO()
    console = Console(stream=said, speaks=comm.rank == 0)
    with pytest.raises(MismatchError):
        train_runs(runs, train_one, folder / "run", False, comm, console)
    assert not (folder / "run" / SUMMARY).exists()
    trained.append("later")
    train_runs(runs, train_one, folder / "run", True, comm, console)
    comm.Barrier()
    names = [Path(each).name for each in trained]
    assert names == ["fold-1", "fold-2", "later", "fold-3"]
    assert all(is_finished(each) for each in runs)
    # Raised steps are a run to continue.
    assert not is_finished(plan_runs(recipe_of(folds, folder / "run", 3), True, 1)[0])
    summary = json.loads((folder / "run" / SUMMARY).read_text())
    losses = [
        [line for line in read_metrics(each.folder / "metrics.jsonl") if "validation_loss" in line][
            -1
        ]["validation_loss"]
        for each in runs
    ]
    assert [each["validation_loss"] for each in summary["runs"]] == losses
    assert summary["figures"]["validation_loss"]["mean"] == pytest.approx(np.mean(losses))
    low, high = summary["figures"]["validation_loss"]["interval"]
    assert low < np.mean(losses) < high
    if comm.rank == 0:
        assert "fold 2, seed 0" in said.getvalue()
        assert "95% interval" in said.getvalue()


def test_seeds_have_folders_of_their_own(folds: Path, folder: Path) -> None:
    recipe = recipe_of(folds, folder / "run")
    recipe = replace(recipe, train=replace(recipe.train, seed=5))
    both = plan_runs(recipe, True, 2)
    assert [str(each.folder.relative_to(folder / "run")) for each in both[:3]] == [
        "fold-1/seed-5",
        "fold-1/seed-6",
        "fold-2/seed-5",
    ]
    assert [each.recipe.train.seed for each in both[:2]] == [5, 6]
    alone = plan_runs(recipe, False, 3)
    assert [each.folder.name for each in alone] == ["seed-5", "seed-6", "seed-7"]
    assert {each.recipe.data.path for each in alone} == {recipe.data.path}


def test_what_is_refused(folds: Path, folder: Path, comm: MPI.Intracomm) -> None:
    recipe = recipe_of(folds, folder / "run")
    whole = replace(recipe, data=replace(recipe.data, path=str(folds)))
    with pytest.raises(RecipeError, match="there is no fold-1 in it; make the folds with"):
        plan_runs(whole, True, 1)
    source = (str(folds / "texts.jsonl"),)
    for given, message in (
        ({"folds": 1}, "would hold out everything"),
        ({"folds": 5, "validation": 0.2}, "and --validation a share"),
        ({"folds": 62}, "--folds 62 needs as many different documents, and there are 61"),
    ):
        options = PrepareOptions(source, folder / "o", tokenizer="bytes", task=TASK, **given)
        with pytest.raises(UsageError, match=message):
            prepare_folds(options, comm, QUIET)
    assert not (folder / "o/fold-1").exists()
    if comm.rank == 0:
        (folder / "odd").mkdir()
        (folder / "odd/fold-1").symlink_to(folds / "data/fold-1")
        (folder / "odd/fold-2").symlink_to(folds / "data/fold-3")
    comm.Barrier()
    odd = replace(recipe, data=replace(recipe.data, path=str(folder / "odd")))
    with pytest.raises(DataError, match="is not fold 2 of 3 of the documents"):
        plan_runs(odd, True, 1)
