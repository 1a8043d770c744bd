"""Score models on task files of lm-evaluation-harness and print it: `evaluate --harness`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_root
from mpillm.errors import UsageError
from mpillm.infer.candidates import NAMES, warn_if_moved
from mpillm.infer.harness.examples import Example, make_examples
from mpillm.infer.harness.harness_model import HarnessModel, open_model_for_harness
from mpillm.infer.harness.score_task import Responses, metrics_of, respond, score_responses
from mpillm.infer.harness.task_file import HarnessTask, read_task
from mpillm.infer.scores.compare import ScoreDifference, compare
from mpillm.infer.scores.print_scores import difference_cells, score_cell
from mpillm.infer.scores.score import Score
from mpillm.models.part_module import torch_explained
from mpillm.system.atomic import check_new_file, write_new_file
from mpillm.system.console import Console, counted
from mpillm.system.json_text import to_json, to_json_lines
from mpillm.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class HarnessOptions:
    """What is asked of `evaluate --harness`. `limit`: of the examples of each file; None: all."""

    files: Sequence[Path]
    limit: int | None = None
    outputs: Path | None = None
    as_json: bool = False


@dataclass
class _Result:
    """The scores of a task by filter and model, with what the models answered."""

    task: HarnessTask
    rows: int
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    responses: list[Responses] = field(default_factory=list)
    cut: int = 0

    def differences(self, chosen: str) -> Mapping[str, ScoreDifference]:
        both = [self.scores[chosen][name] for name in NAMES if name in self.scores[chosen]]
        return compare(*both) if len(both) > 1 else {}


def print_harness(
    trained: Sequence[Path],
    options: HarnessOptions,
    comm: "MPI.Intracomm",
    console: Console,
    device: str = "auto",
) -> None:
    """Score one model, or two that are compared, on task files. Every rank calls it.

    Files are checked before a model is loaded. Raises UsageError for a key that is not supported,
    DataError for data that does not fit, MismatchError for a model that is no decoder.
    """
    on_root(comm, lambda: check_new_file(options.outputs, "--outputs"))
    # One rank reads the data of all.
    asked = on_root(comm, lambda: _read(options))
    quiet = Console(speaks=False) if options.as_json else console
    results = [_Result(task, len(examples)) for task, examples in asked]
    with torch_explained():
        models = [open_model_for_harness(path, comm, quiet, device) for path in trained]
        for name, model in zip(NAMES, models, strict=False):
            for result, (_, examples) in zip(results, asked, strict=True):
                _score(result, name, model, examples, comm)
    checkpoints = [model.loaded.checkpoint for model in models]
    for each in checkpoints:
        warn_if_moved(each, quiet)
    if options.as_json:
        console.write(to_json(_json(checkpoints, results)) + "\n")
    else:
        _print_table([str(each.folder) for each in checkpoints], results, console)
    lines = to_json_lines(_rows(results), default=str)
    on_root(comm, lambda: write_new_file(options.outputs, lines, "--outputs"))


def _read(options: HarnessOptions) -> list[tuple[HarnessTask, list[Example]]]:
    tasks = [read_task(path) for path in options.files]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--harness names two tasks {name!r}; give each key task another name")
    return [(task, make_examples(task, options.limit)) for task in tasks]


def _score(
    result: _Result,
    name: str,
    model: HarnessModel,
    examples: Sequence[Example],
    comm: "MPI.Intracomm",
) -> None:
    before = model.cut
    responses = respond(model, result.task, examples)
    result.responses.append(responses)
    metrics = metrics_of(result.task)
    for chosen in result.task.filters:
        score = score_responses(responses, chosen, metrics, comm)
        result.scores.setdefault(chosen.name, {})[name] = score
    if cut := model.cut - before:
        result.cut += cut
        model.console.warn(
            f"{result.task.name}: {counted(cut, 'request')} of "
            f"{sum(len(each.requests) for each in examples):,} longer than the model's context of "
            f"{model.loaded.model.spec.context:,} tokens: the left part is cut off, as by lm-eval"
        )


def _print_table(folders: Sequence[str], results: Sequence[_Result], console: Console) -> None:
    both = len(folders) > 1
    more = [*NAMES[1:], "difference", "p"] if both else []
    lines = []
    for result in results:
        metrics = metrics_of(result.task)
        for chosen, scores in result.scores.items():
            differences = result.differences(chosen)
            for metric in metrics:
                cells = [score_cell(score, metric) for score in scores.values()]
                if both:
                    cells += difference_cells(differences.get(metric.name), metric.digits)
                shots = str(result.task.fewshot.count)
                lines.append(
                    [result.task.name, chosen, shots, str(result.rows), metric.name, *cells]
                )
    title = f"{' and '.join(folders)}: tasks of lm-evaluation-harness, with 95% intervals"
    console.table(title, ["task", "filter", "shots", "n", "metric", NAMES[0], *more], lines)


def _json(checkpoints: Sequence[Checkpoint], results: Sequence[_Result]) -> dict[str, object]:
    first, *others = checkpoints
    facts: dict[str, object] = {"checkpoint": str(first.folder), "step": first.step}
    if others:
        facts["other_checkpoint"] = str(others[0].folder)
    return facts | {"tasks": {result.task.name: _json_of(result) for result in results}}


def _json_of(result: _Result) -> dict[str, object]:
    models: dict[str, dict[str, object]] = {}
    for chosen, scores in result.scores.items():
        for name, score in scores.items():
            for metric, value in score.values.items():
                figure = {"value": value, "interval": score.intervals[metric]}
                models.setdefault(name, {})[f"{metric},{chosen}"] = figure
        for metric, difference in result.differences(chosen).items():
            models.setdefault("difference", {})[f"{metric},{chosen}"] = difference.to_json()
    return {
        "file": str(result.task.path),
        "output_type": result.task.output_type,
        "num_fewshot": result.task.fewshot.count,
        "rows": result.rows,
        "cut": result.cut,
        **models,
    }


def _rows(results: Sequence[_Result]) -> list[dict[str, object]]:
    """Collect the rows of --outputs: of each example those of the first model, then the other."""
    return [
        {"model": name, **responses.row(place)}
        for result in results
        for place in range(result.rows)
        for name, responses in zip(NAMES, result.responses, strict=False)
    ]
