"""Order statistics, bus bandwidths, overlap, the fit: pure arithmetic on made-up times."""

import math

import numpy as np
import pytest

from mpillm.bench.make_profile import fit
from mpillm.bench.statistics import bus_factor, collective_row, floor_share, overlap, ratios, times


@pytest.mark.parametrize(
    ("operation", "factor"),
    [
        ("allreduce", 1.5),
        ("reduce_scatter", 0.75),
        ("allgather", 0.75),
        ("alltoall", 0.75),
        ("broadcast", 1.0),
        ("reduce", 1.0),
        ("barrier", 0.0),
    ],
)
def test_bus_factors_of_nccl_tests(operation: str, factor: float) -> None:
    assert bus_factor(operation, 4) == factor


def test_the_least_traffic() -> None:
    assert floor_share("allreduce", 4) == floor_share("alltoall", 4) == 1
    assert floor_share("reduce_scatter", 4) == floor_share("allgather", 4) == 0.625
    assert floor_share("broadcast", 4) == 0.5


def test_times_and_rates() -> None:
    seconds = np.array([4.0, 1.0, 2.0, 3.0, 100.0])
    found = times(seconds)
    assert (found.least, found.median, found.most) == (1, 3, 100)
    assert found.median < found.p99 < found.most
    row = collective_row("allreduce", 3000, 4, seconds)
    assert row["algorithm_bytes_per_second"] == 1000
    assert row["bus_bytes_per_second"] == 1500


def test_a_ratio_is_taken_within_a_round() -> None:
    # The second round was noisy for both.
    found = ratios(np.array([2.0, 200.0, 2.0]), np.array([1.0, 100.0, 4.0]))
    assert found == {"mpi_ratio": 2.0, "mpi_ratio_q1": 1.25, "mpi_ratio_q3": 2.0}


@pytest.mark.parametrize(
    ("together", "share"), [(10.0, 1.0), (12.0, 0.5), (14.0, 0.0), (20.0, 0.0), (9.0, 1.0)]
)
def test_overlap(together: float, share: float) -> None:
    assert overlap(alone=4.0, compute=10.0, together=together) == share


def test_fit_finds_latency_and_rate_through_noise() -> None:
    chance = np.random.default_rng(3)
    sizes = [1 << power for power in range(3, 27)]
    points = [(n, (5e-6 + n / 8e9) * float(chance.uniform(0.95, 1.05))) for n in sizes]
    line = fit(points)
    assert line.latency_seconds == pytest.approx(5e-6, rel=0.05)
    assert line.bytes_per_second == pytest.approx(8e9, rel=0.05)
    assert 0.01 < line.relative_error < 0.06
    assert line.seconds(1 << 20) == pytest.approx(5e-6 + (1 << 20) / 8e9, rel=0.05)


def test_fit_of_exact_points_has_no_error() -> None:
    line = fit([(n, 1e-6 + n / 1e9) for n in (0, 1000, 10**6)])
    assert line.relative_error < 1e-9


def test_fit_never_goes_below_zero() -> None:
    falling = fit([(1, 2.0), (1000, 1.0)])
    assert falling.bytes_per_second is None
    assert 1 <= falling.latency_seconds <= 2
    assert fit([(1000, 1.0), (2000, 4.0)]).latency_seconds == 0
    alone = fit([(64, 3.0)])
    assert (alone.seconds(64), alone.bytes_per_second) == (3.0, None)
    assert math.isfinite(alone.relative_error)
