import math
import sys

import numpy as np
import pytest

from mpillm.errors import UsageError
from mpillm.tasks.metrics.likelihood import BitsPerByte, Loss, Perplexity
from mpillm.tasks.metrics.metric import Metric, Totals
from mpillm.tasks.metrics.metric_catalog import METRICS, check_metrics, make_metrics

NONE = np.empty(0)
TOTALS = Totals(loss_sum=600.0, weight=200.0, text_bytes=400)


def test_the_likelihood_s_metrics() -> None:
    assert Loss().value(NONE, TOTALS) == 3.0
    assert Perplexity().value(NONE, TOTALS) == pytest.approx(math.exp(3))
    assert BitsPerByte().value(NONE, TOTALS) == pytest.approx(600 / math.log(2) / 400)


def test_extremes_have_values() -> None:
    assert math.isfinite(Perplexity().value(NONE, Totals(1e6, 1.0, 0)))
    assert math.isfinite(BitsPerByte().value(NONE, Totals(1.0, 1.0, 0)))


class Counting(Metric):
    name = "counting"

    def of_rows(self, outputs, fields) -> np.ndarray:  # type: ignore[no-untyped-def]
        return np.ones((len(outputs[0]), 1))

    def value(self, sums: np.ndarray, totals: Totals) -> float:
        return float(sums[0])


def test_a_metric_that_reads_outputs_needs_more_than_totals() -> None:
    alone = ("loss", "perplexity", "bits-per-byte")
    assert all(metric.needs_totals_alone for metric in make_metrics(alone))
    assert not any(metric.needs_totals_alone for metric in make_metrics(set(METRICS) - set(alone)))
    assert not Counting().needs_totals_alone


@pytest.mark.parametrize("name", METRICS)
def test_each_entry_names_itself(name: str) -> None:
    (metric,) = make_metrics([name])
    assert metric.name == name
    assert metric.title


def test_metrics_keep_the_order_of_their_names() -> None:
    names = ["perplexity", "loss"]
    assert [metric.name for metric in make_metrics(names)] == names
    with pytest.raises(UsageError, match="no metric is called 'los', did you mean loss"):
        make_metrics(["los"])


class OfAnEarlierRelease(Counting):
    name = "earlier"

    def of_batch(self, outputs, fields) -> list[float]:  # type: ignore[no-untyped-def]
        return [1.0]


def test_a_metric_of_an_earlier_release_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "earlier", sys.modules[__name__])
    with pytest.raises(UsageError, match="statistics of each row by `of_rows`"):
        make_metrics(["earlier:OfAnEarlierRelease"])


def test_a_metric_that_does_not_fit_the_task_is_refused_with_those_that_do() -> None:
    check_metrics(["bleu", "entity-f1"], "a plug-in", "any")
    check_metrics(["loss", "macro-f1"], "sequence-classification", "a class of each row")
    with pytest.raises(UsageError, match="take one of loss, accuracy, precision, recall, macro-f1"):
        check_metrics(["loss", "bleu"], "sequence-classification", "a class of each row")
    with pytest.raises(UsageError, match=r"take one of loss, perplexity, bits-per-byte, accuracy$"):
        check_metrics(["mse"], "causal-lm", "next tokens")
    with pytest.raises(UsageError, match="bleu compares texts"):
        make_metrics(["bleu"])[0].of_rows([], {})
