"""A line through times: seconds = latency + bytes / rate (Hockney 1994), by least squares on relative error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """`bytes_per_second` is None where the times do not grow with the bytes.

    `relative_error`: the root of the mean square of (fitted − measured) / measured.
    """

    latency_seconds: float
    bytes_per_second: float | None
    relative_error: float

    def seconds(self, nbytes: float) -> float:
        return self.latency_seconds + (
            nbytes / self.bytes_per_second if self.bytes_per_second else 0.0
        )


def fit(points: Sequence[tuple[float, float]]) -> Fit:
    """The line nearest to `points`, (bytes, seconds > 0), at least one; neither of its two parts is below zero.

    Relative, since a least-squares line in seconds would see the largest size alone.
    """
    # With weights w = 1/t² the normal equations of Σ w (a + b n − t)².
    weights = [1 / seconds**2 for _, seconds in points]
    w = sum(weights)
    wn = sum(weight * n for weight, (n, _) in zip(weights, points, strict=True))
    wnn = sum(weight * n * n for weight, (n, _) in zip(weights, points, strict=True))
    wt = sum(weight * t for weight, (_, t) in zip(weights, points, strict=True))
    wnt = sum(weight * n * t for weight, (n, t) in zip(weights, points, strict=True))
    determinant = w * wnn - wn * wn
    latency, slope = wt / w, 0.0
    if determinant > 1e-12 * w * wnn:
        latency, slope = (wt * wnn - wnt * wn) / determinant, (w * wnt - wn * wt) / determinant
    if latency < 0:
        latency, slope = 0.0, wnt / wnn
    elif slope <= 0:
        latency, slope = wt / w, 0.0
    errors = [((latency + slope * n) / t - 1) ** 2 for n, t in points]
    return Fit(latency, 1 / slope if slope else None, math.sqrt(sum(errors) / len(errors)))
