"""Trained models with the data that they are scored on, checked to fit each other."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.errors import MismatchError
from mpillm.infer.evaluate import WholeModel
from mpillm.infer.imported_task import check_evaluated
from mpillm.infer.loading import Loaded, check_classes, load_data, load_trained
from mpillm.infer.scores.compare import ScoreDifference
from mpillm.infer.scores.score import Score
from mpillm.infer.task_checks import check_task
from mpillm.parallel.step_plan import Precision
from mpillm.runs.evaluations import is_recorded, record_evaluation
from mpillm.runs.run_files import moved_from
from mpillm.system.console import Console
from mpillm.system.messages import explain
from mpillm.tasks.task import Task
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.manifest import Manifest, check_tokenizer
from mpillm.tokens.samples import RowShape
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.places import CHECKPOINTS

if TYPE_CHECKING:
    from mpi4py import MPI

# What the scores of a model and of a second one are called.
NAMES = ("model", "other")


@dataclass(frozen=True)
class Candidate:
    """A model with the data that it is scored on."""

    loaded: Loaded
    manifest: Manifest

    @property
    def task(self) -> Task:
        return self.loaded.task

    @property
    def row(self) -> RowShape:
        return RowShape.of(self.task, Lengths.of(self.loaded.model.spec))

    def scorer(self, precision: Precision, comm: "MPI.Intracomm") -> WholeModel:
        """Move the model to its device; return it as each rank scores its share of the rows."""
        model = self.loaded.model.to(precision.device)
        return WholeModel(model, self.task, comm, precision)

    def facts(self) -> dict[str, object]:
        checkpoint = self.loaded.checkpoint
        same = self.manifest.manifest_hash == checkpoint.facts["data"]
        return {
            "checkpoint": str(checkpoint.folder),
            "step": checkpoint.step,
            "data": str(self.manifest.folder),
            "data_of_the_run": same,
        }


def open_candidates(
    paths: Sequence[Path], data: Path | None, comm: "MPI.Intracomm", console: Console
) -> list[Candidate]:
    """Load one model, or two for the same rows, with data (None: of its run). Every rank calls it.

    Raises MismatchError where models and data do not fit, CheckpointError and DataError.
    """
    found = [_open(path, data, comm, console) for path in paths]
    if len(found) > 1:
        _check_same_rows(*found)
    return found


def _open(path: Path, data: Path | None, comm: "MPI.Intracomm", console: Console) -> Candidate:
    loaded = load_trained(path, comm, console)
    check_evaluated(loaded.checkpoint.facts)
    manifest = load_data(loaded.checkpoint, data)
    check_tokenizer(manifest, loaded.tokenizer)
    check_task(loaded.task, loaded.model.spec, manifest)
    check_classes(loaded.checkpoint, manifest)
    return Candidate(loaded, manifest)


def _check_same_rows(one: Candidate, other: Candidate) -> None:
    """Raise MismatchError unless both models are scored on the same rows of the same data."""
    if one.manifest.manifest_hash != other.manifest.manifest_hash:
        raise MismatchError(
            f"the models have other data: {one.manifest.folder} and {other.manifest.folder}, whose "
            "manifests differ; name one dataset for both with --data FOLDER"
        )
    if one.task.name != other.task.name:
        raise MismatchError(
            f"the models learnt other tasks, {one.task.name} and {other.task.name}: they have no "
            "figures in common"
        )
    # A pair is a row whatever its length; a text is cut into windows as long as the context.
    if not one.task.pair_kinds and one.row.tokens != other.row.tokens:
        raise MismatchError(
            f"the models read windows of {one.row.tokens:,} and {other.row.tokens:,} tokens, so "
            "their rows are not the same; evaluate each by itself"
        )


def title_of(found: Sequence[Candidate]) -> str:
    """Say which models are scored on which data."""
    folders = " and ".join(str(each.loaded.checkpoint.folder) for each in found)
    return f"{folders} on {found[0].manifest.folder}"


def facts_of(
    found: Sequence[Candidate],
    scores: Mapping[str, Mapping[str, object]],
    differences: Mapping[str, ScoreDifference] | None,
) -> dict[str, object]:
    """Collect what --json prints: the models, their scores by name, and how these differ."""
    facts: dict[str, object] = {**found[0].facts(), **scores}
    if differences is not None:
        facts["other_checkpoint"] = str(found[1].loaded.checkpoint.folder)
        facts["difference"] = {
            name.replace("-", "_"): each.to_json() for name, each in differences.items()
        }
    return facts


def run_of(checkpoint: Checkpoint) -> Path | None:
    """Return the folder of the run that a checkpoint is of; None for a checkpoint by itself."""
    folder = checkpoint.folder.absolute()
    return folder.parents[1] if folder.parent.name == CHECKPOINTS else None


def record_scores(
    found: Sequence[Candidate], scores: Mapping[str, Score], console: Console
) -> None:
    """Record an evaluation in the run's folder, where one may write there. Rank 0 calls it.

    A failure is a warning: the scores are printed.
    """
    checkpoint = found[0].loaded.checkpoint
    run = run_of(checkpoint)
    if run is None or not is_recorded(run):
        return
    facts = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "checkpoint": str(checkpoint.folder.absolute().relative_to(run)),
        "step": checkpoint.step,
        "data": str(found[0].manifest.folder),
        "classes": list(found[0].task.classes),
        **({"other": str(found[1].loaded.checkpoint.folder)} if len(found) > 1 else {}),
        "scores": {name: each.record() for name, each in scores.items()},
    }
    try:
        record_evaluation(run, facts)
    except OSError as failure:
        console.warn(f"the evaluation is not recorded: {explain(failure, run)}")


def warn_if_moved(checkpoint: Checkpoint, console: Console) -> None:
    """Warn where a run is a copy, or was moved."""
    run = run_of(checkpoint)
    known = checkpoint.facts
    begun = moved_from(run, known["recipe"], known.get("folder")) if run else ""
    if begun:
        console.warn(f"{run} was trained as {begun}: it is a copy, or was moved")
