"""pass@k: the chance that one of k samples of a problem is right (Chen et al. 2021)."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from mpillm.errors import UsageError
from mpillm.tasks.metrics.metric import Array, Arrays, Metric, Totals


class PassAtK(Metric):
    """The unbiased estimator from n samples of each problem, c of them right: 1 - C(n-c,k)/C(n,k).

    A row is a problem, with the fields `samples` and `passed` (B,).
    """

    name: ClassVar[str] = "pass@1"
    title: ClassVar[str] = "pass@1"
    output_kinds: ClassVar[tuple[str, ...]] = ("samples of a problem",)
    k: ClassVar[int] = 1

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        return pass_at_k(fields["samples"], fields["passed"], self.k)[:, None]

    def value(self, sums: Array, totals: Totals) -> float:
        return float(sums[0]) / totals.weight


class PassAt10(PassAtK):
    name: ClassVar[str] = "pass@10"
    title: ClassVar[str] = "pass@10"
    k: ClassVar[int] = 10


class PassAt100(PassAtK):
    name: ClassVar[str] = "pass@100"
    title: ClassVar[str] = "pass@100"
    k: ClassVar[int] = 100


def pass_at_k(samples: Array, passed: Array, k: int) -> Array:
    """Estimate the chance of each problem, from `samples` of which `passed` are right, (B,) each.

    Raises UsageError where a problem has fewer than `k` samples, or more right ones than samples.
    """
    for number, (each, right) in enumerate(zip(samples.tolist(), passed.tolist(), strict=True)):
        if not (each >= k and 0 <= right <= each):
            raise UsageError(
                f"pass@{k} needs {k} samples of each problem at least, of which some are right; "
                f"problem {number:,} has {each}, and {right} right ones"
            )
    # The product form: binomials of hundreds overflow.
    chances = [
        1.0 if each - right < k else 1.0 - np.prod(1.0 - k / np.arange(each - right + 1, each + 1))
        for each, right in zip(samples.tolist(), passed.tolist(), strict=True)
    ]
    return np.array(chances, np.float64)
