"""The split is the one that was asked for, as near as whole documents allow, at any ranks."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from mpillm.system.console import Console
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.split import (
    FEW_DOCUMENTS,
    VALIDATION,
    SplitPlan,
    cut_tail,
    plan_split,
    take_nearest,
)


def keys_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)


def share(plan: SplitPlan, keys: np.ndarray, nbytes: np.ndarray) -> float:
    return float(nbytes[plan.of(keys) == VALIDATION].sum() / nbytes.sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("count", "asked", "whole"),
    [(400, 0.001, 1), (60, 0.0005, 1), (10, 0.01, 1), (40, 0.05, 2), (400, 0.999, 399)],
)
def test_equal_documents_are_counted(
    count: int, asked: float, whole: int, seed: int, comm: MPI.Intracomm
) -> None:
    """A whole document is the nearest, where the hash gave none and each was cut before."""
    keys, nbytes = keys_of(count, seed), np.full(count, 60)
    mine = slice(comm.rank, None, comm.size)
    plan = plan_split(keys[mine], nbytes[mine], asked, comm)
    assert not plan.cut
    assert int((plan.of(keys) == VALIDATION).sum()) == whole


@given(
    sizes=st.lists(st.integers(1, 10_000), min_size=2, max_size=60),
    asked=st.floats(0.001, 0.999),
    seed=st.integers(0, 99),
)
def test_a_share_misses_by_a_document_at_most(sizes: list[int], asked: float, seed: int) -> None:
    keys, nbytes = keys_of(len(sizes), seed), np.array(sizes)
    plan = plan_split(keys, nbytes, asked, MPI.COMM_SELF)
    again = plan_split(keys[::-1], nbytes[::-1], asked, MPI.COMM_SELF)
    assert plan.cut == again.cut
    if plan.cut:
        assert len(sizes) < FEW_DOCUMENTS or max(sizes) > sum(sizes) / FEW_DOCUMENTS
        return
    assert np.array_equal(plan.of(keys), again.of(keys))
    assert 0 < plan.of(keys).sum() < len(sizes)
    missed = abs(share(plan, keys, nbytes) - asked)
    assert missed <= 0.5 * min(asked, 1 - asked) + max(sizes) / sum(sizes)


def test_a_long_document_does_not_swamp_the_validation(comm: MPI.Intracomm) -> None:
    nbytes = np.array([5000, *[100] * 50])
    for seed in range(9):
        keys = keys_of(51, seed)
        mine = slice(comm.rank, None, comm.size)
        plan = plan_split(keys[mine], nbytes[mine], 0.05, comm)
        assert share(plan, keys, nbytes) == pytest.approx(0.05, abs=0.026)


def test_equal_texts_stay_together() -> None:
    keys = np.repeat(keys_of(20), 3)
    plan = plan_split(keys, np.full(60, 9), 0.04, MPI.COMM_SELF)
    chosen = plan.of(keys).reshape(20, 3)
    assert (chosen.min(1) == chosen.max(1)).all()
    assert 0 < chosen.sum() < 60


def test_the_nearest_is_taken() -> None:
    assert take_nearest(np.array([5, 5, 5]), 1).tolist() == [0]
    assert take_nearest(np.array([9, 2, 3, 2]), 5).tolist() == [1, 2]
    assert take_nearest(np.array([9, 2, 8]), 5).tolist() == [1]
    assert take_nearest(np.array([9, 2, 4]), 6).tolist() == [1, 2]
    assert take_nearest(np.array([1, 1]), 2).tolist() == [0]


@pytest.mark.parametrize("asked", [0.001, 0.01, 0.1, 0.5, 0.9])
def test_a_cut_is_near_too(asked: float) -> None:
    """Also of a text of two lines, where a line's start is in the middle."""
    for text in ("word " * 500 + "\n" + "word " * 480, "word " * 1000, "x" * 3000):
        first, second = cut_tail(text, asked)
        assert first + second == text
        assert abs(len(second) / len(text) - asked) <= 0.5 * min(asked, 1 - asked) + 1 / len(text)


def test_what_came_out_is_printed(folder: Path, comm: MPI.Intracomm) -> None:
    if comm.rank == 0:
        (folder / "texts").mkdir()
        for number in range(100):
            (folder / "texts" / f"{number:02}.txt").write_text(f"document {number:02}\nline 2\n")
    comm.Barrier()
    said = io.StringIO()
    options = PrepareOptions(
        (str(folder / "texts"),), folder / "out", "bytes", validation=0.001, shard_bytes=4096
    )
    manifest = prepare(options, comm, Console(comm.rank == 0, said))
    assert manifest.splits["validation"].n_docs == 1
    assert manifest.splits["train"].n_docs == 99
    assert comm.rank or "validation: 1% of the bytes (asked: 0.1%)" in said.getvalue()
