"""What the runs of several folds and seeds say together: mean, spread and a 95% interval.

Training sets of K folds overlap, so that the spread of the folds is less than that of independent
ones. The variance of their mean is taken as (1/K + 1/(K - 1)) of the variance between folds, where
1/(K - 1) is the share of test to training rows (Nadeau & Bengio 2003, "Inference for the
generalization error"). Seeds of one fold are averaged first. Without folds, seeds are independent.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mpillm.errors import DataError
from mpillm.runs.folder import METRICS
from mpillm.runs.metrics import read_metrics
from mpillm.system.console import Console

PREFIX, LOSS = "validation_", "validation_loss"
# The 97.5% quantile of Student's t by degrees of freedom from 1; R's qt(0.975, 1:30).
QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
NORMAL = 1.959964


@dataclass(frozen=True)
class FigureSpread:
    """A figure over all runs. `spread`: the standard deviation between folds, else seeds."""

    mean: float
    spread: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class FoldSummary:
    """The last evaluation of each run, by (fold, seed), and the figures of all."""

    runs: Sequence[tuple[int, int]]
    values: Sequence[Mapping[str, float]]
    figures: Mapping[str, FigureSpread]

    def to_json(self) -> dict[str, object]:
        runs = [
            {**({"fold": fold} if fold else {}), "seed": seed, **values}
            for (fold, seed), values in zip(self.runs, self.values, strict=True)
        ]
        return {
            "runs": runs,
            "figures": {name: asdict(each) for name, each in self.figures.items()},
        }

    def print(self, title: str, console: Console) -> None:
        names = list(self.figures)
        folds = self.runs[0][0] > 0
        rows = [
            [f"fold {fold}, seed {seed}" if fold else f"seed {seed}"]
            + [f"{values[name]:.4f}" for name in names]
            for (fold, seed), values in zip(self.runs, self.values, strict=True)
        ]
        every = [self.figures[name] for name in names]
        rows.append(["mean", *(f"{each.mean:.4f}" for each in every)])
        if len(self.runs) > 1:
            between = "folds" if folds else "seeds"
            rows.append(
                [f"spread of {between}"]
                + ["–" if each.spread is None else f"{each.spread:.4f}" for each in every]
            )
            rows.append(["95% interval", *(_bounds(each.interval) for each in every)])
        columns = [name.replace("_", " ") for name in names]
        console.table(f"{title}: the last evaluation of each run", ["", *columns], rows)


def read_figures(run: Path) -> dict[str, float]:
    """Read the figures of a run's last evaluation. Raises DataError where it has none."""
    lines = [line for line in read_metrics(run / METRICS) if LOSS in line]
    if not lines:
        raise DataError(
            f"{run / METRICS} has no evaluation; prepare the data with a validation split, and "
            "train again"
        )
    return {name: float(value) for name, value in lines[-1].items() if name.startswith(PREFIX)}


def summarise(
    runs: Sequence[tuple[int, int]], values: Sequence[Mapping[str, float]]
) -> FoldSummary:
    """Summarise the figures that all of the runs, (fold, seed) each, have."""
    names = [name for name in values[0] if all(name in each for each in values)]
    folds = sorted({fold for fold, _ in runs})
    figures = {}
    for name in names:
        pairs = [(fold, each[name]) for (fold, _), each in zip(runs, values, strict=True)]
        if folds == [0]:
            figures[name] = spread_of([value for _, value in pairs], share=0.0)
            continue
        means = [
            statistics.fmean(value for fold, value in pairs if fold == number) for number in folds
        ]
        figures[name] = spread_of(means, share=1 / max(len(folds) - 1, 1))
    return FoldSummary(runs, values, figures)


def spread_of(values: Sequence[float], share: float) -> FigureSpread:
    """Compute the mean of `values`, their standard deviation, and the interval of the mean.

    `share`: of test to training rows, where the training sets overlap; 0: they are independent.
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return FigureSpread(mean, None, None)
    spread = statistics.stdev(values)
    quantile = QUANTILES[count - 2] if count - 2 < len(QUANTILES) else _large_quantile(count - 1)
    half = quantile * spread * math.sqrt(1 / count + share)
    return FigureSpread(mean, spread, (mean - half, mean + half))


def _large_quantile(freedom: int) -> float:
    """Approximate the 97.5% quantile of Student's t for more than 30 degrees of freedom.

    The first terms of the expansion of Cornish and Fisher, right to four digits.
    """
    z = NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def _bounds(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:.4f}–{interval[1]:.4f}" if interval else "–"
