"""Compare two models on the same rows: differences, intervals, and p of a paired bootstrap."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mpillm.errors import MismatchError
from mpillm.infer.scores.bootstrap import Interval, p_of_difference, percentile_interval
from mpillm.infer.scores.score import Score


@dataclass(frozen=True)
class ScoreDifference:
    """What the second model has more of a metric than the first."""

    value: float
    interval: Interval | None
    p: float

    def to_json(self) -> dict[str, object]:
        p = None if math.isnan(self.p) else self.p
        return {"value": self.value, "interval": self.interval, "p": p}


def compare(one: Score, other: Score) -> Mapping[str, ScoreDifference]:
    """Compare the scores of the same rows, with intervals, by each metric that both have.

    Replicates are paired: both have each row equally often in each. Raises MismatchError where the
    rows are not the same number.
    """
    if one.rows != other.rows:
        raise MismatchError(
            f"one model was scored on {one.rows:,} rows and the other on {other.rows:,}: only "
            "figures of the same rows can be compared"
        )
    found = {}
    for name, ours in one.values.items():
        theirs = other.values.get(name)
        if ours is None or theirs is None:
            continue
        differences = other.replicates[name] - one.replicates[name]
        found[name] = ScoreDifference(
            theirs - ours,
            percentile_interval(differences),
            p_of_difference(theirs - ours, differences),
        )
    return found
