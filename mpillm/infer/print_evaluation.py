"""Print the scores of a trained model, or of two on the same data: the work of `evaluate`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_root
from mpillm.comm.waiting import patient_barrier
from mpillm.errors import UsageError
from mpillm.infer.baselines import score_baselines
from mpillm.infer.candidates import (
    NAMES,
    Candidate,
    facts_of,
    open_candidates,
    record_scores,
    title_of,
    warn_if_moved,
)
from mpillm.infer.cloze_baselines import score_cloze_baselines
from mpillm.infer.loading import open_of
from mpillm.infer.references import read_references
from mpillm.infer.scores.calibrate import Calibration, calibrate, check_calibrates
from mpillm.infer.scores.compare import ScoreDifference, compare
from mpillm.infer.scores.print_scores import print_confusions, print_scores
from mpillm.infer.scores.score import Score
from mpillm.infer.scores.score_answers import evaluate_task
from mpillm.infer.scores.text_baselines import require_text_baselines, score_text_baselines
from mpillm.machine.node_map import map_nodes
from mpillm.models.part_module import torch_explained
from mpillm.parallel.devices import choose_device
from mpillm.parallel.step_plan import Precision
from mpillm.plan.peak_memory import rows_at_once
from mpillm.runs.report.class_plots import CONFUSION, RELIABILITY, draw_classes
from mpillm.system.atomic import check_outputs
from mpillm.system.console import Console
from mpillm.system.json_text import to_json
from mpillm.tasks.causal_lm import CausalLM
from mpillm.tasks.masked_lm import MaskedLM
from mpillm.tasks.metrics.metric import CLASSES, Metric
from mpillm.tasks.metrics.metric_catalog import make_metrics
from mpillm.tasks.sequence_classification import SequenceClassification
from mpillm.tasks.task import Task
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.reader import TokenReader

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class ClassifierOptions:
    """What is asked of a classifier. `calibrated`: fit a temperature. `plot`: a file for plots."""

    calibrated: bool = False
    plot: Path | None = None


def print_evaluation(
    trained: Path,
    data: Path | None,
    baselines: bool,
    as_json: bool,
    comm: "MPI.Intracomm",
    console: Console,
    metrics: Sequence[str] = (),
    device: str = "auto",
    other: Path | None = None,
    more: "ClassifierOptions | None" = None,
) -> None:
    """Score a trained model on the validation split of `data` (None: of its own data) and print it.

    `baselines`: score simple models, too. `device`: cpu, cuda or auto. `other`: compare a second
    model with it. `more`: what classifiers alone have. Every rank calls it. Raises MismatchError
    when the data was made with another tokenizer than the model's, or two models differ in their
    data.
    """
    more = more or ClassifierOptions()
    on_root(comm, lambda: check_outputs({"--plot": more.plot}))
    place, _ = choose_device(device, comm, map_nodes(comm), option="--device")
    places = [trained] if other is None else [trained, other]
    found = open_candidates(places, data, comm, console)
    if baselines:
        check_baselines(found[0].task)
    if more.calibrated:
        check_calibrates(found[0].task)
    if more.plot:
        metrics = _with_plotted(metrics, found[0].task)
    # One JSON object is all that --json prints: no warnings, no progress bar.
    quiet = Console(speaks=False) if as_json else console
    scores, fitted = {}, None
    with torch_explained():
        for name, each in zip(NAMES, found, strict=False):
            scores[name] = _score(each, Precision(place), metrics, comm, quiet)
        if more.calibrated:
            fitted = _calibrate(found[0], Precision(place), comm, quiet)
        of_task = (*found[0].task.metrics, *found[0].task.answer_metrics)
        made = make_metrics(metrics or of_task, found[0].task.classes)
        if baselines and comm.rank == 0:
            scores |= _score_baselines(found[0], made)
    # Rank 0 counts the training data alone: the others sleep meanwhile.
    patient_barrier(comm)
    differences = compare(scores["model"], scores["other"]) if other is not None else None
    if as_json:
        _print_json(found, scores, differences, fitted, console)
    else:
        _print_tables(found, scores, differences, made, console)
        if fitted is not None:
            console.say(fitted.describe())
    on_root(comm, lambda: record_scores(found, scores, quiet))
    if more.plot:
        plot, tables = more.plot, {name: each.tables for name, each in scores.items()}
        on_root(comm, lambda: draw_classes(tables, found[0].task.classes, plot))


def _with_plotted(metrics: Sequence[str], task: Task) -> list[str]:
    """Return the metrics (none: the task's) with those of the plots.

    Raises UsageError for a task without classes.
    """
    if task.output_kind not in CLASSES or not task.classes:
        raise UsageError(
            f"--plot draws the reliability and the confusions of classes, and the task {task.name} "
            f"gives {'none' if task.output_kind in CLASSES else task.output_kind}; leave it out"
        )
    return list(dict.fromkeys((*(metrics or task.metrics), RELIABILITY, CONFUSION)))


def _score(
    candidate: Candidate,
    precision: Precision,
    metrics: Sequence[str],
    comm: "MPI.Intracomm",
    console: Console,
) -> Score:
    with open_of(candidate.manifest, "validation") as reader:
        if cuts := on_root(comm, lambda: reader.describe_cuts(candidate.row)):
            console.warn(cuts)
        scorer = candidate.scorer(precision, comm)
        if candidate.task.needs_reference:
            checkpoint = candidate.loaded.checkpoint
            assert isinstance(reader, PairReader)
            reader.references = read_references(checkpoint, candidate.manifest, comm)
        return evaluate_task(scorer, reader, comm, console, metrics, True)


def _calibrate(
    candidate: Candidate, precision: Precision, comm: "MPI.Intracomm", console: Console
) -> Calibration:
    with open_of(candidate.manifest, "validation") as reader:
        return calibrate(candidate.scorer(precision, comm), reader, comm, console)


def _score_baselines(candidate: Candidate, metrics: Sequence[Metric]) -> dict[str, Score]:
    """Score the baselines of the model's task, which has some, on this rank alone."""
    from mpi4py import MPI

    task, spec, manifest = candidate.task, candidate.loaded.model.spec, candidate.manifest
    with open_of(manifest, "train") as train, open_of(manifest, "validation") as reader:
        if isinstance(train, PairReader) and isinstance(reader, PairReader):
            tokenizer = candidate.loaded.tokenizer
            return score_text_baselines(
                train, reader, tokenizer, task, spec, metrics, MPI.COMM_SELF
            )
        assert isinstance(train, TokenReader)
        assert isinstance(reader, TokenReader)
        if isinstance(task, MaskedLM):
            samples = reader.evaluation(candidate.row, rows_at_once(spec))
            counted = score_cloze_baselines(train, samples, task, metrics)
        else:
            counted = score_baselines(train, reader, manifest.vocab_size, metrics)
    return {"bigram": counted.bigram, "unigram": counted.unigram}


def check_baselines(task: Task) -> None:
    """Raise UsageError where a task has no baselines, or their packages are missing."""
    if isinstance(task, SequenceClassification):
        require_text_baselines()
    elif not isinstance(task, CausalLM | MaskedLM):
        raise UsageError(
            f"there are no baselines of the task {task.name}, only of causal-lm, masked-lm and "
            "sequence-classification; leave out --baselines"
        )


def _print_json(
    found: Sequence[Candidate],
    scores: Mapping[str, Score],
    differences: Mapping[str, ScoreDifference] | None,
    fitted: Calibration | None,
    console: Console,
) -> None:
    facts = facts_of(found, {name: each.to_json() for name, each in scores.items()}, differences)
    if fitted is not None:
        facts["calibration"] = asdict(fitted)
    console.write(to_json(facts) + "\n")


def _print_tables(
    found: Sequence[Candidate],
    scores: Mapping[str, Score],
    differences: Mapping[str, ScoreDifference] | None,
    metrics: Sequence[Metric],
    console: Console,
) -> None:
    for name, each in zip(NAMES, found, strict=False):
        checkpoint = each.loaded.checkpoint
        warn_if_moved(checkpoint, console)
        if not math.isfinite(scores[name].loss):
            console.warn(
                f"the loss is not finite: the model of {checkpoint.folder} diverged; "
                "name an earlier checkpoint"
            )
    model = scores["model"]
    unit = "records" if found[0].task.needs_reference else "tokens"
    title = (
        f"{title_of(found)}: {int(model.totals.weight):,} validation {unit}, "
        f"n = {model.rows:,} rows, with 95% intervals"
    )
    print_scores(title, scores, metrics, console, differences)
    print_confusions(scores, metrics, found[0].task.classes, console)
