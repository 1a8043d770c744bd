"""The metrics of lm-evaluation-harness: what an example adds, and the value over all examples.

Each is a function of a ratio of two sums over examples, by the rules of lm-eval 0.4.13
(lm_eval/api/metrics.py). So ranks add up sums, and a bootstrap over examples gives its interval.
"""

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.errors import UsageError
from mpillm.tasks.metrics.metric import Array, Arrays, Metric, Totals

PUNCTUATION = str.maketrans("", "", string.punctuation)
DIGITS = str.maketrans("", "", string.digits)
# The output types of each metric, and its one aggregation.
OUTPUT_TYPES: Mapping[str, tuple[tuple[str, ...], str]] = MappingProxyType(
    {
        "acc": (("multiple_choice", "loglikelihood"), "mean"),
        "acc_norm": (("multiple_choice",), "mean"),
        "acc_bytes": (("multiple_choice",), "mean"),
        "perplexity": (("loglikelihood",), "perplexity"),
        "word_perplexity": (("loglikelihood_rolling",), "weighted_perplexity"),
        "byte_perplexity": (("loglikelihood_rolling",), "weighted_perplexity"),
        "bits_per_byte": (("loglikelihood_rolling",), "bits_per_byte"),
        "exact_match": (("generate_until",), "mean"),
    }
)
# Where a file has no metric_list.
USUAL: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "multiple_choice": ("acc", "acc_norm"),
        "loglikelihood": ("perplexity", "acc"),
        "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
        "generate_until": ("exact_match",),
    }
)
SWITCHES = ("ignore_case", "ignore_punctuation", "ignore_numbers")


class RatioMetric(Metric):
    """A function of the sum of one statistic over the sum of another one."""

    @staticmethod
    def link(ratio: float) -> float:
        """Return the metric's value of the ratio: by default the ratio itself, a mean."""
        return ratio

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        raise UsageError(f"the metric {self.name} is of task files of lm-evaluation-harness alone")

    def value(self, sums: Array, totals: Totals) -> float:
        # A replicate may draw none of the few examples that there are.
        return self.link(float(sums[0]) / float(sums[1])) if sums[1] else math.nan


class HarnessPerplexity(RatioMetric):
    """The inverse of the likelihood of an example, a word or a byte: their geometric mean."""

    digits: ClassVar[int] = 3
    lower_is_better: ClassVar[bool] = True

    @staticmethod
    def link(ratio: float) -> float:
        try:
            return math.exp(-ratio)
        except OverflowError:
            return math.inf


class HarnessBitsPerByte(RatioMetric):
    """The bits that an ideal code of the model takes for a byte."""

    lower_is_better: ClassVar[bool] = True

    @staticmethod
    def link(ratio: float) -> float:
        return -ratio / math.log(2)


KINDS: Mapping[str, type[RatioMetric]] = MappingProxyType(
    {
        "mean": RatioMetric,
        "perplexity": HarnessPerplexity,
        "weighted_perplexity": HarnessPerplexity,
        "bits_per_byte": HarnessBitsPerByte,
    }
)


@dataclass(frozen=True)
class MetricSettings:
    """A metric that a file asks for. The switches are those of exact_match."""

    name: str
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_numbers: bool = False
    regexes: tuple[str, ...] = ()

    def make(self) -> RatioMetric:
        # The name of a metric is its class's.
        kind = KINDS[OUTPUT_TYPES[self.name][1]]
        made: RatioMetric = type(self.name, (kind,), {"name": self.name, "title": self.name})()
        return made

    def matches(self, text: str, reference: str) -> bool:
        """Return whether a text equals a reference, both without what is to be ignored."""
        return self._plain(text) == self._plain(reference)

    def _plain(self, text: str) -> str:
        for pattern in self.regexes:
            text = re.sub(pattern, "", text)
        text = text.lower() if self.ignore_case else text
        text = text.translate(PUNCTUATION) if self.ignore_punctuation else text
        return text.translate(DIGITS) if self.ignore_numbers else text


def read_metrics(listed: Any, output_type: str, place: str) -> tuple[MetricSettings, ...]:
    """Read the key metric_list. Raises UsageError for what is not supported."""
    if listed is None:
        return tuple(map(MetricSettings, USUAL[output_type]))
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"{place}: metric_list must be a list of metrics, and not {listed!r:.80}")
    return tuple(_settings(entry, output_type, place) for entry in listed)


def _settings(entry: Any, output_type: str, place: str) -> MetricSettings:
    name = entry.get("metric") if isinstance(entry, dict) else entry
    known = [each for each, (types, _) in OUTPUT_TYPES.items() if output_type in types]
    if not isinstance(entry, dict) or name not in known:
        raise UsageError(
            f"{place}: the metric {name!r} is not supported for output_type {output_type}; take "
            f"one of {', '.join(known)}, or let lm-eval itself drive the model: "
            "`mpillm lm-eval --help`"
        )
    aggregation = entry.get("aggregation", OUTPUT_TYPES[name][1])
    if aggregation != OUTPUT_TYPES[name][1]:
        raise UsageError(
            f"{place}: the metric {name} has the aggregation {OUTPUT_TYPES[name][1]}, and not "
            f"{aggregation!r}; correct it"
        )
    own = (*SWITCHES, "regexes_to_ignore") if name == "exact_match" else ()
    for key in entry:
        if key not in {"metric", "aggregation", "higher_is_better", *own}:
            raise UsageError(
                f"{place}: the metric {name} has no key {key}; it has "
                f"{', '.join(('aggregation', 'higher_is_better', *own))}"
            )
    regexes = entry.get("regexes_to_ignore") or []
    case, punctuation, numbers = (bool(entry.get(key)) for key in SWITCHES)
    return MetricSettings(name, case, punctuation, numbers, _regexes(regexes, place))


def _regexes(given: Any, place: str) -> tuple[str, ...]:
    listed = given if isinstance(given, list) else [given]
    try:
        for pattern in listed:
            re.compile(pattern)
    except (re.error, TypeError) as failure:
        raise UsageError(
            f"{place}: regexes_to_ignore cannot be read: {failure}; correct {given!r:.80}"
        ) from failure
    return tuple(listed)
