"""The clock's turns, and that all ranks see the same figures."""

import itertools
import time

import numpy as np
from mpi4py import MPI

from mpillm.bench.sample_arrays import new_array
from mpillm.bench.timing import LARGEST_BATCH, batch_of, in_turn, interleave, slowest
from mpillm.comm.buffers import ELEMENTS, itemsize_of


def test_no_one_follows_the_same_neighbour_always() -> None:
    """Each comes before each other as often as behind it, and directly behind each other now and
    then.
    """
    names = ["a", "b", "c", "d"]
    orders = [in_turn(names, turn) for turn in range(60)]
    assert all(sorted(order) == names for order in orders)
    for one, other in itertools.permutations(names, 2):
        assert sum(order.index(one) < order.index(other) for order in orders) == 30
        assert 5 < sum((one, other) in itertools.pairwise(order) for order in orders) < 25
    assert in_turn([], 3) == []


def test_short_calls_are_timed_in_batches() -> None:
    assert batch_of(1.0) == 1
    assert batch_of(1e-5) == 20
    assert batch_of(0.0) == LARGEST_BATCH


def test_each_round_calls_everyone_and_all_ranks_agree(comm: MPI.Intracomm) -> None:
    calls: list[str] = []
    makes = {
        name: lambda name=name: lambda: (calls.append(name), time.sleep(1e-3))
        for name in ("a", "b")
    }
    rounds: list[int] = []
    found = interleave(comm, makes, 4, 1, advance=lambda: rounds.append(1))  # type: ignore[arg-type]
    assert len(rounds) == 5
    turns = [calls[4:][place : place + 2] for place in range(0, 10, 2)]
    assert turns == [in_turn(["a", "b"], turn) for turn in range(5)]
    assert len(calls) == 14
    assert all(sorted(turn) == ["a", "b"] for turn in turns)
    assert (turns[1], turns[3]) == (turns[0][::-1], turns[2][::-1])
    assert all(seconds.shape == (4,) for seconds in found.values())
    for seconds in found.values():
        assert all((other == seconds).all() for other in comm.allgather(seconds))


def test_fresh_makes_anew_each_time(comm: MPI.Intracomm) -> None:
    made: list[int] = []

    def make() -> "type[int]":
        made.append(1)
        return int

    interleave(comm, {"a": make}, 3, 2, fresh=True)
    assert len(made) == 5


def test_the_slowest_rank_counts(comm: MPI.Intracomm) -> None:
    assert slowest(comm, np.array([1.0, -1.0]) * comm.rank).tolist() == [comm.size - 1, 0]


def test_new_arrays_of_every_type() -> None:
    for element in ELEMENTS:
        for pages in (False, True):
            array = new_array(5, element, "cpu", pages)
            array[...] = 3
            assert len(array) == 5
            assert str(array.dtype).removeprefix("torch.") == element
            assert array.nbytes == 5 * itemsize_of(element)
    assert len(new_array(0, "float32", "cpu", pages=True)) == 0
