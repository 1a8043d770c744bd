"""Print the results of `evaluate` and `generate`: the work of their verbs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_root
from mpillm.comm.waiting import patient_barrier
from mpillm.errors import UsageError
from mpillm.infer.baselines import Baselines, score_baselines
from mpillm.infer.cloze_baselines import score_cloze_baselines
from mpillm.infer.evaluate import WholeModel, evaluate
from mpillm.infer.generate import generate
from mpillm.infer.imported_task import check_evaluated
from mpillm.infer.loading import Loaded, check_classes, load_data, load_trained, open_of
from mpillm.infer.sampling import Sampling, check_prompt
from mpillm.infer.scores.score import Score
from mpillm.infer.task_checks import check_task
from mpillm.machine.node_map import map_nodes
from mpillm.models.part_module import torch_explained
from mpillm.parallel.devices import choose_device
from mpillm.parallel.step_plan import Precision
from mpillm.plan.peak_memory import rows_at_once
from mpillm.runs.run_files import moved_from
from mpillm.system.console import Console
from mpillm.system.json_text import to_json
from mpillm.tasks.causal_lm import CausalLM
from mpillm.tasks.masked_lm import MaskedLM
from mpillm.tasks.metrics.metric import Metric
from mpillm.tasks.metrics.metric_catalog import make_metrics
from mpillm.tasks.task import Task
from mpillm.tasks.task_catalog import read_settings
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.manifest import Manifest, check_tokenizer
from mpillm.tokens.reader import TokenReader
from mpillm.tokens.samples import RowShape
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.places import CHECKPOINTS

if TYPE_CHECKING:
    from mpi4py import MPI


def print_evaluation(
    trained: Path,
    data: Path | None,
    baselines: bool,
    as_json: bool,
    comm: "MPI.Intracomm",
    console: Console,
    metrics: Sequence[str] = (),
    device: str = "auto",
) -> None:
    """Score a trained model on the validation split of `data` (None: of its own data) and print it.

    `baselines`: score counting models, too. `device`: cpu, cuda or auto. Every rank calls it.
    Raises MismatchError when the data was made with another tokenizer than the model's.
    """
    place, _ = choose_device(device, comm, map_nodes(comm), option="--device")
    loaded = load_trained(trained, comm, console)
    check_evaluated(loaded.checkpoint.facts)
    if baselines:
        check_baselines(loaded.task)
    loaded.model.to(place)
    manifest = load_data(loaded.checkpoint, data)
    folder = manifest.folder
    check_tokenizer(manifest, loaded.tokenizer)
    check_task(loaded.task, loaded.model.spec, manifest)
    check_classes(loaded.checkpoint, manifest)
    same = manifest.manifest_hash == loaded.checkpoint.facts["data"]
    run = _run_of(loaded.checkpoint)
    known = loaded.checkpoint.facts
    begun = moved_from(run, known["recipe"], known.get("folder")) if run else ""
    if begun and not as_json:
        console.warn(f"{run} was trained as {begun}: it is a copy, or was moved")
    with torch_explained(), open_of(manifest, "validation") as reader:
        row = RowShape.of(loaded.task, Lengths.of(loaded.model.spec))
        if not as_json and (cuts := on_root(comm, lambda: reader.describe_cuts(row))):
            console.warn(cuts)
        # One JSON object is all that --json prints: no progress bar.
        progress = Console(speaks=False) if as_json else console
        scorer = WholeModel(loaded.model, loaded.task, comm, Precision(place))
        scores = {"model": evaluate(scorer, reader, comm, progress, metrics, True)}
        if baselines and comm.rank == 0 and isinstance(reader, TokenReader):
            counted = _count(loaded, manifest, reader, make_metrics(scores["model"].values))
            scores |= {"bigram": counted.bigram, "unigram": counted.unigram}
    # Rank 0 counts the training tokens alone: the others sleep meanwhile.
    patient_barrier(comm)
    if not as_json:
        _print_table(scores, loaded, folder, console)
        return
    facts = {
        "checkpoint": str(loaded.checkpoint.folder),
        "step": loaded.checkpoint.step,
        "data": str(folder),
        "data_of_the_run": same,
    }
    console.write(to_json(facts | {name: score.to_json() for name, score in scores.items()}) + "\n")


def _count(
    loaded: Loaded, manifest: Manifest, reader: TokenReader, metrics: Sequence[Metric]
) -> Baselines:
    """Score the baselines of the model's task, which has some."""
    task, spec = loaded.task, loaded.model.spec
    with open_of(manifest, "train") as train:
        assert isinstance(train, TokenReader)
        if not isinstance(task, MaskedLM):
            return score_baselines(train, reader, manifest.vocab_size, metrics)
        samples = reader.evaluation(RowShape.of(task, Lengths.of(spec)), rows_at_once(spec))
        return score_cloze_baselines(train, samples, task, metrics)


def check_baselines(task: Task) -> None:
    """Raise UsageError where a task has no baselines."""
    if not isinstance(task, CausalLM | MaskedLM):
        raise UsageError(
            f"there are no baselines of the task {task.name}, only of causal-lm and masked-lm; "
            "leave out --baselines"
        )


def _run_of(checkpoint: Checkpoint) -> Path | None:
    """Return the run that a checkpoint is in; None for one that was copied out of its run."""
    folder = checkpoint.folder.absolute()
    return folder.parents[1] if folder.parent.name == CHECKPOINTS else None


def _print_table(scores: dict[str, Score], loaded: Loaded, folder: Path, console: Console) -> None:
    model = scores["model"]
    if not math.isfinite(model.loss):
        console.warn(
            f"the loss is not finite: the model of {loaded.checkpoint.folder} diverged; "
            "name an earlier checkpoint"
        )
    metrics = make_metrics(model.values)
    console.table(
        f"{loaded.checkpoint.folder} on {folder}: {int(model.totals.weight):,} validation tokens, "
        f"n = {model.rows:,} rows, with 95% intervals",
        ["", *(metric.title for metric in metrics)],
        [
            [name, *(score_cell(score, metric) for metric in metrics)]
            for name, score in scores.items()
        ],
    )


def score_cell(score: Score, metric: Metric) -> str:
    """Write a value with its interval, such as `0.8125 (0.7934–0.8309)`."""
    value, digits = score.values[metric.name], metric.digits
    if value is None:
        return "–"
    interval = score.intervals.get(metric.name)
    bounds = f" ({interval[0]:,.{digits}f}–{interval[1]:,.{digits}f})" if interval else ""
    return f"{value:,.{digits}f}{bounds}"


def print_generation(
    trained: Path,
    prompt: str,
    sampling: Sampling,
    comm: "MPI.Intracomm",
    console: Console,
    device: str = "auto",
) -> None:
    """Print the prompt and the model's continuation as it comes; of a source the result alone.

    Every rank calls it; rank 0 computes, on `device` (cpu, cuda or auto).
    """
    check_prompt(prompt)
    place, _ = choose_device(device, comm, map_nodes(comm), share=True, option="--device")
    loaded = load_trained(trained, comm, console)
    if comm.rank == 0:
        loaded.model.to(place)
    task = read_settings(loaded.checkpoint.facts["recipe"].get("task", {}))
    pieces = generate(loaded.model, loaded.tokenizer, prompt, sampling, task)
    # Drawn through on_root: a model that has diverged fails on all ranks together.
    # The first piece ahead of the prompt: a model that cannot generate prints nothing.
    text = on_root(comm, lambda: next(pieces, None))
    if comm.rank == 0 and not loaded.model.spec.source_field:
        console.write(prompt)
    while text is not None:
        if comm.rank == 0:
            console.write(text)
        text = on_root(comm, lambda: next(pieces, None))
    if comm.rank == 0:
        console.write("\n")
