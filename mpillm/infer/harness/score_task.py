"""Score a model on a task of lm-evaluation-harness: its responses, and the metrics of these."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.comm.failure import on_all
from mpillm.infer.harness.examples import Example
from mpillm.infer.harness.filters import ResponseFilter
from mpillm.infer.harness.harness_metrics import MetricSettings, RatioMetric
from mpillm.infer.harness.harness_model import HarnessModel, Likelihood
from mpillm.infer.harness.task_file import HarnessTask
from mpillm.infer.scores.exact_sums import in_batches
from mpillm.infer.scores.score import Score, score_rows
from mpillm.tasks.metrics.metric import Array

if TYPE_CHECKING:
    from mpi4py import MPI

WORDS = re.compile(r"\s+")
# (numerator, denominator) of an example.
Ratio = tuple[float, float]


@dataclass(frozen=True)
class Responses:
    """What a model answers to the examples of a task, in their order.

    Of each example the likelihoods of its continuations, that of its text, or the text written.
    """

    task: HarnessTask
    examples: Sequence[Example]
    found: Sequence[Sequence[Any]]

    def row(self, place: int) -> dict[str, object]:
        """Return an example as a row of --outputs: with its requests, responses and metrics."""
        example, found = self.examples[place], self.found[place]
        row: dict[str, object] = {
            "task": self.task.name,
            "number": example.number,
            "record": example.record,
            "requests": [list(each) for each in example.requests],
            "right": list(example.right),
        }
        if self.task.output_type == "generate_until":
            row["output"] = found[0]
            row["filtered"] = {each.name: each(found[0]) for each in self.task.filters}
        elif self.task.output_type == "loglikelihood_rolling":
            row["loglikelihood"] = found[0]
        else:
            row["loglikelihoods"] = [each.value for each in found]
            row["greedy"] = [each.greedy for each in found]
        row["metrics"] = {
            f"{metric.name},{each.name}": list(_ratio(metric, each, example, found))
            for each in self.task.filters
            for metric in self.task.metrics
        }
        return row


def respond(model: HarnessModel, task: HarnessTask, examples: Sequence[Example]) -> Responses:
    """Ask a model all requests of the examples. Every rank calls it, and gets all responses."""
    requests = [request for example in examples for request in example.requests]
    found: Sequence[Any]
    if task.output_type == "loglikelihood_rolling":
        found = model.rolling([text for (text,) in requests])
    elif task.output_type == "generate_until":
        found = model.texts([context for (context,) in requests], task.generation)
    else:
        found = model.likelihoods([(context, ending) for context, ending in requests])
    ends = list(accumulate((len(example.requests) for example in examples), initial=0))
    parts = [found[first:last] for first, last in pairwise(ends)]
    return Responses(task, examples, parts)


def metrics_of(task: HarnessTask) -> list[RatioMetric]:
    """Make the metrics of a task."""
    return [each.make() for each in task.metrics]


def score_responses(
    responses: Responses,
    chosen: ResponseFilter,
    metrics: Sequence[RatioMetric],
    comm: "MPI.Intracomm",
) -> Score:
    """Compute the metrics over all examples, each once, with their intervals.

    Every rank calls it with all responses, takes its share of the examples, and gets the score.
    """
    numbers = range(comm.rank, len(responses.examples), comm.size)

    def table() -> Array:
        rows = [
            [
                value
                for metric in responses.task.metrics
                for value in _ratio(metric, chosen, responses.examples[n], responses.found[n])
            ]
            for n in numbers
        ]
        return np.array(rows, np.float64).reshape(len(numbers), 2 * len(metrics))

    found = on_all(comm, table)
    # Ahead of the statistics a row has its loss, which there is none of, and its weight.
    whole = np.concatenate([np.zeros((len(numbers), 1)), np.ones((len(numbers), 1)), found], axis=1)
    widths = [2] * len(metrics) if len(numbers) else []
    own = in_batches(np.array(numbers, np.int64), whole)
    return score_rows(own, widths, metrics, comm, rows=len(responses.examples))


def _ratio(
    metric: MetricSettings, chosen: ResponseFilter, example: Example, found: Sequence[Any]
) -> Ratio:
    """Return what an example adds to the two sums of a metric."""
    name = metric.name
    if name == "exact_match":
        text = chosen(found[0])
        return float(any(metric.matches(text, each) for each in example.right)), 1.0
    if name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        text = example.requests[0][0]
        words = name == "word_perplexity"
        return found[0], float(len(WORDS.split(text)) if words else len(text.encode()))
    if name == "perplexity":
        return found[0].value, 1.0
    if not example.choices:
        return float(found[0].greedy), 1.0
    return float(_choice(name, example, found) in example.right), 1.0


def _choice(name: str, example: Example, found: Sequence[Likelihood]) -> int:
    """Return the number of the likeliest choice; acc_norm: a letter, acc_bytes: a byte of it."""
    values = np.array([each.value for each in found])
    if name == "acc_norm":
        values /= [len(each) for each in example.choices]
    elif name == "acc_bytes":
        values /= [len(each.encode()) for each in example.choices]
    return int(np.argmax(values))
