"""The table of metrics by name; a plug-in is named as `package.module:Name`."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from mpillm.errors import UsageError
from mpillm.system.plugins import load_class
from mpillm.tasks.metrics.metric import Metric

METRICS: Mapping[str, str] = MappingProxyType(
    {
        "loss": "mpillm.tasks.metrics.likelihood:Loss",
        "perplexity": "mpillm.tasks.metrics.likelihood:Perplexity",
        "bits-per-byte": "mpillm.tasks.metrics.likelihood:BitsPerByte",
        "accuracy": "mpillm.tasks.metrics.accuracy:Accuracy",
        "precision": "mpillm.tasks.metrics.precision_recall:MacroPrecision",
        "recall": "mpillm.tasks.metrics.precision_recall:MacroRecall",
        "macro-f1": "mpillm.tasks.metrics.macro_f1:MacroF1",
        "micro-f1": "mpillm.tasks.metrics.micro_f1:MicroF1",
        "confusion-matrix": "mpillm.tasks.metrics.confusion_matrix:ConfusionMatrix",
        "ece": "mpillm.tasks.metrics.calibration:CalibrationError",
        "reliability": "mpillm.tasks.metrics.calibration:Reliability",
        "brier": "mpillm.tasks.metrics.calibration:Brier",
        "mse": "mpillm.tasks.metrics.regression:SquaredError",
        "mae": "mpillm.tasks.metrics.regression:AbsoluteError",
        "pearson": "mpillm.tasks.metrics.regression:Pearson",
        "spearman": "mpillm.tasks.metrics.spearman:Spearman",
        "preference-accuracy": "mpillm.tasks.metrics.rewards:PreferenceAccuracy",
        "reward-margin": "mpillm.tasks.metrics.rewards:RewardMargin",
        "entity-f1": "mpillm.tasks.metrics.entity_f1:EntityF1",
        "token-error-rate": "mpillm.tasks.metrics.token_error_rate:TokenErrorRate",
        "word-error-rate": "mpillm.tasks.metrics.token_error_rate:WordErrorRate",
        "exact-match": "mpillm.tasks.metrics.question_answers:ExactMatch",
        "squad-f1": "mpillm.tasks.metrics.question_answers:AnswerF1",
        "bleu": "mpillm.tasks.metrics.bleu:Bleu",
        "chrf": "mpillm.tasks.metrics.bleu:Chrf",
        "rouge-1": "mpillm.tasks.metrics.rouge:Rouge1",
        "rouge-2": "mpillm.tasks.metrics.rouge:Rouge2",
        "rouge-l": "mpillm.tasks.metrics.rouge:RougeL",
        "mrr@10": "mpillm.tasks.metrics.retrieval:ReciprocalRank",
        "ndcg@10": "mpillm.tasks.metrics.retrieval:Ndcg",
        "recall@1": "mpillm.tasks.metrics.retrieval:RecallAt1",
        "recall@10": "mpillm.tasks.metrics.retrieval:RecallAt10",
        "recall@100": "mpillm.tasks.metrics.retrieval:RecallAt100",
        "pass@1": "mpillm.tasks.metrics.pass_at_k:PassAtK",
        "pass@10": "mpillm.tasks.metrics.pass_at_k:PassAt10",
        "pass@100": "mpillm.tasks.metrics.pass_at_k:PassAt100",
    }
)


def make_metrics(names: Iterable[str], classes: Sequence[str] = ()) -> list[Metric]:
    """Make the metrics called `names`, in order, for a task with these `classes`.

    Raises UsageError for a name that is not known, or a metric that does not fit the classes.
    """
    metrics = [_kind(name).make(classes) for name in names]
    for metric in metrics:
        if hasattr(metric, "of_batch"):
            raise UsageError(
                f"the metric {metric.name} gives sums of a batch by `of_batch`, as of mpillm 0.1; "
                "give statistics of each row by `of_rows`: docs/extending.md"
            )
    return metrics


def check_metrics(names: Iterable[str], task: str, output_kind: str) -> None:
    """Raise UsageError for a metric that cannot read what `task` gives, with those that can."""
    if output_kind == "any":
        return
    for name in names:
        kinds = _kind(name).output_kinds
        if kinds and output_kind not in kinds:
            kinds_of = {each: _kind(each).output_kinds for each in METRICS}
            fits = [each for each, read in kinds_of.items() if not read or output_kind in read]
            raise UsageError(
                f"the metric {name} reads {' or '.join(kinds)}, and the task {task} gives "
                f"{output_kind}; take one of {', '.join(fits)}"
            )


def metrics_of(kind: type[Metric]) -> list[str]:
    """Return the names of the metrics of the catalogue that derive from `kind`."""
    return [name for name in METRICS if issubclass(_kind(name), kind)]


def _kind(name: str) -> type[Metric]:
    return load_class(name, METRICS, "metric", Metric)  # type: ignore[type-abstract]
