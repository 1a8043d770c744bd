"""The data whose sum is exact, and the wrong elements that are planted in it."""

import numpy as np
import pytest
import torch

from mpillm.bench.pattern import (
    EXACT,
    PERIOD,
    combined,
    count_wrong,
    fill,
    laid,
    pattern,
    wrong_elements,
)
from mpillm.bench.sample_arrays import Shape, fitting_count, new_array
from mpillm.comm.buffers import ELEMENTS


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("element", ELEMENTS)
def test_sums_and_means_are_exact(element: str, ranks: int) -> None:
    for op in ("sum", "mean"):
        rows = np.array([pattern(rank, ranks, element, op) for rank in range(ranks)])
        assert rows.min() >= 0
        assert rows.sum(0).max() <= EXACT.get(element, 1 << 20)
        assert len(np.unique(rows)) > 1 or ranks == 64
        assert (rows.sum(0) == combined(ranks, element, op) * (ranks if op == "mean" else 1)).all()


def test_more_ranks_than_exact_numbers() -> None:
    rows = np.array([pattern(rank, 300, "int8", "sum") for rank in range(300)])
    assert 0 < rows.sum(0).max() <= EXACT["int8"]


@pytest.mark.parametrize("element", ELEMENTS)
def test_filled_arrays_are_right_and_a_planted_fault_is_counted(element: str) -> None:
    array, period = new_array(3 * PERIOD + 5, element, "cpu"), pattern(1, 2, element, "sum")
    fill(array, period, 700)
    assert wrong_elements(array, period, 700) == 0
    array[11] += 1
    array[2000] += 1
    assert wrong_elements(array, period, 700) == 2
    assert wrong_elements(array, period, 701) > PERIOD


def test_not_a_number_is_wrong() -> None:
    array = torch.full((9,), float("nan"), dtype=torch.bfloat16)
    assert wrong_elements(array, np.zeros(PERIOD, np.int64)) == 9


def test_a_shifted_block_of_a_power_of_two_is_seen() -> None:
    period = pattern(0, 2, "float32", "sum")
    assert (laid(period, 0, 4096) != laid(period, 4096, 4096)).mean() > 0.9


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "operation", ["allreduce", "reduce_scatter", "allgather", "broadcast", "reduce", "alltoall"]
)
def test_each_operation_has_its_expectation(operation: str, in_place: bool) -> None:
    """Three ranks played by one process, by the textbook; then one element is spoilt."""
    ranks, count = 3, fitting_count(operation, 3000, "float32", 3)
    shapes = [Shape(operation, count, "float32", ranks, rank, in_place) for rank in range(ranks)]
    sources = [new_array(shape.counts()[0], "float32", "cpu") for shape in shapes]
    for shape, source in zip(shapes, sources, strict=True):
        shape.fill_source(source)
    for shape in shapes:
        wanted = played(shape, sources)
        found = shape.result(wanted, wanted)
        count_of = (found, shape.bounds, shape.rank, "float32", "sum", 0)
        assert count_wrong(operation, *count_of) == 0
        found[len(found) // 2] += 1
        unseen = operation == "reduce" and shape.rank
        assert count_wrong(operation, *count_of) == (0 if unseen else 1)


def played(shape: Shape, sources: list[np.ndarray]) -> np.ndarray:
    bounds, own = shape.bounds, slice(shape.bounds[shape.rank], shape.bounds[shape.rank + 1])
    if shape.operation == "broadcast":
        return sources[0].copy()
    if shape.operation == "allgather":
        whole = [
            source[bounds[r] : bounds[r + 1]] if shape.in_place else source
            for r, source in enumerate(sources)
        ]
        return np.concatenate(whole)
    if shape.operation == "alltoall":
        return np.concatenate([source[own] for source in sources])
    total = np.sum(sources, 0, dtype=np.float32)
    return total[own] if shape.operation == "reduce_scatter" and not shape.in_place else total


def test_counts_fit_the_ranks() -> None:
    assert fitting_count("allreduce", 10, "float32", 3) == 2
    assert fitting_count("allreduce", 1, "float64", 3) == 1
    assert fitting_count("alltoall", 100, "float32", 3) == 24
    assert fitting_count("allgather", 1, "bfloat16", 3) == 3
