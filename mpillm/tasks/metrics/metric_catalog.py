"""The table of metrics by name; a plug-in is named as `package.module:Name`."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from mpillm.errors import UsageError
from mpillm.system.plugins import load_class
from mpillm.tasks.metrics.metric import Metric

METRICS: Mapping[str, str] = MappingProxyType(
    {
        "loss": "mpillm.tasks.metrics.likelihood:Loss",
        "perplexity": "mpillm.tasks.metrics.likelihood:Perplexity",
        "accuracy": "mpillm.tasks.metrics.accuracy:Accuracy",
        "macro-f1": "mpillm.tasks.metrics.macro_f1:MacroF1",
        "token-error-rate": "mpillm.tasks.metrics.token_error_rate:TokenErrorRate",
        "word-error-rate": "mpillm.tasks.metrics.token_error_rate:WordErrorRate",
        "bits-per-byte": "mpillm.tasks.metrics.likelihood:BitsPerByte",
    }
)


def make_metrics(names: Iterable[str]) -> list[Metric]:
    """Make the metrics called `names`, in order. Raises UsageError for a name that is not known."""
    metrics = [load_class(name, METRICS, "metric", Metric)() for name in names]  # type: ignore[type-abstract]
    for metric in metrics:
        if hasattr(metric, "of_batch"):
            raise UsageError(
                f"the metric {metric.name} gives sums of a batch by `of_batch`, as of mpillm 0.1; "
                "give statistics of each row by `of_rows`: docs/extending.md"
            )
    return metrics
