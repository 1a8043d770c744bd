"""Packing: each conversation once, in few rows, in an order that the seed decides."""

import numpy as np
import pytest

from mpillm.tokens.pairs.packing import WINDOW, one_a_row, pack_rows

LENGTHS = np.random.default_rng(1).lognormal(4.6, 0.7, 3000).astype(np.int64).clip(1, 512)


def test_each_conversation_is_in_one_row_and_fits() -> None:
    lengths = LENGTHS.copy()
    lengths[::7] = 0
    packing = pack_rows(lengths, 512, 3)
    rows = [packing.of_row(row) for row in range(len(packing))]
    assert sorted(np.concatenate(rows)) == np.flatnonzero(lengths).tolist()
    totals = np.array([lengths[row].sum() for row in rows])
    assert totals.max() <= 512
    # Of the room in the rows little is left; only the last row of a window may be nearly empty.
    assert len(rows) <= lengths.sum() / 512 * 1.03 + len(lengths) // WINDOW + 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_conversations_are_packed(count: int) -> None:
    packing = pack_rows(np.full(count, 200, np.int64), 512, 0)
    assert [len(packing.of_row(row)) for row in range(len(packing))] == [2] * (count // 2) + [1] * (
        count % 2
    )


def test_the_seed_alone_decides() -> None:
    first, again, other = (pack_rows(LENGTHS, 512, seed) for seed in (3, 3, 4))
    assert (first.members == again.members).all()
    assert (first.firsts == again.firsts).all()
    assert (first.members != other.members).any()


def test_an_epoch_has_each_row_once_in_an_order_of_its_own() -> None:
    packing = pack_rows(LENGTHS, 512, 3)
    count = len(packing)
    epochs = packing.rows(np.arange(2 * count), 3).reshape(2, count)
    assert all(sorted(rows) == list(range(count)) for rows in epochs.tolist())
    assert (epochs[0] != epochs[1]).any()
    # Any part of the order is found by itself.
    assert (packing.rows(np.array([count + 5]), 3) == epochs[1, 5]).all()


def test_without_packing_each_has_a_row() -> None:
    packing = one_a_row(np.array([3, 0, 5], np.int64))
    assert [packing.of_row(row).tolist() for row in range(len(packing))] == [[0], [2]]
