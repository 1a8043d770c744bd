"""Statistics of a step, read from the rows of all ranks of a mesh of two or three axes."""

import math

import numpy as np
import pytest

from mpillm.parallel import axis_sizes
from mpillm.parallel.parallel_axis import ParallelAxis
from mpillm.train.step_stats import (
    BEGIN,
    BUSY,
    END,
    HAS_LOSSES,
    LOSSES,
    MEMORY,
    REDUCING,
    STOP,
    axis_groups,
    check_finite,
    read_stats,
)


class Copies(ParallelAxis):
    name = "copies"
    repeats_loss = True

    def shares(self, model, batch):
        return ""

    def fault(self, size, model, batch):
        return ""

    def traffic_bytes(self, sizes, model, batch, chunks, element):
        return 0.0

    def wait_seconds(self, times, groups):
        return 5.0 if len(groups[0]) > 1 else 0.0


def rows(ranks: int, losing: dict[int, list[float]]) -> np.ndarray:
    every = np.zeros((ranks, LOSSES + 2))
    every[:, END], every[:, BUSY], every[:, REDUCING] = 10.0, 8.0, 0.5
    every[:, MEMORY] = np.arange(ranks) + 1
    for rank, losses in losing.items():
        every[rank, HAS_LOSSES], every[rank, LOSSES:] = 1, losses
    return every


def test_groups_differ_along_one_axis_alone() -> None:
    sizes = {"data": 2, "pipeline": 2, "copies": 2}
    assert axis_groups(sizes, "copies") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert axis_groups(sizes, "pipeline") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert axis_groups(sizes, "data") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert axis_groups({"data": 3}, "data") == [[0, 1, 2]]


def test_losses_are_those_of_the_last_stages() -> None:
    stats = read_stats(rows(4, {1: [0.1, 0.2], 3: [0.3, 0.4]}), {"data": 2, "pipeline": 2})
    assert stats.losses == {1: [0.1, 0.2], 3: [0.3, 0.4]}
    assert stats.loss == math.fsum([0.1, 0.2, 0.3, 0.4])
    assert stats.memory_bytes == 4
    assert stats.wait_seconds == {"data": 0.5, "pipeline": 2.0}
    assert stats.bubble == pytest.approx(10 / 8 - 1)


def test_an_axis_that_repeats_the_work_changes_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(axis_sizes, "AXES", (*axis_sizes.AXES, Copies()))
    sizes = {"data": 2, "pipeline": 2, "copies": 2}
    last = {2: [0.1, 0.2], 3: [0.1, 0.2], 6: [0.3, 0.4], 7: [0.3, 0.4]}
    stats = read_stats(rows(8, last), sizes)
    assert stats.losses == {2: [0.1, 0.2], 6: [0.3, 0.4]}
    assert stats.loss == math.fsum([0.1, 0.2, 0.3, 0.4])
    assert stats.wait_seconds == {"data": 0.5, "pipeline": 2.0, "copies": 5.0}
    assert stats.bubble == pytest.approx(10 / 8 - 1)


def test_one_rank_waits_for_nothing() -> None:
    stats = read_stats(rows(1, {0: [1.0, 2.0]}), {"data": 1, "pipeline": 1})
    assert (stats.wait_seconds, stats.bubble, stats.loss) == ({}, 0.0, 3.0)


def test_stop_requests_are_by_rank() -> None:
    every = rows(2, {0: [1.0, 1.0]})
    every[1, STOP], every[:, BEGIN] = 15, 1.0
    assert read_stats(every, {"data": 2}).stops == [0, 15]


def test_numbers_that_are_not_finite_are_named() -> None:
    assert check_finite(3, {0: [1.0]}, 1.0) == ""
    assert (
        check_finite(3, {0: [1.0], 2: [1.0, math.nan]}, 1.0)
        == "at step 4 the loss of rank 2 is nan"
    )
    assert "norm of the summed gradients is inf" in check_finite(3, {0: [1.0]}, math.inf)
