"""Sums over two levels in pieces: their order, whatever takes how long; and real ones, over nodes
made of one.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.comm.buffers import as_buffer
from mpillm.comm.executors import dispatch
from mpillm.comm.executors.dispatch import Dispatcher
from mpillm.comm.executors.hierarchical import HierarchicalPiece, HierarchicalRequest
from mpillm.comm.selection import CollectiveCall
from mpillm.comm.shared.team import NodeTeam
from mpillm.errors import CommError
from mpillm.machine.node_map import NodeMap, map_nodes

ENDLESS = 10**9
LONG = 2**20 + 3


class Slow:
    """A request that is done after `polls` tests, and records its events."""

    def __init__(self, name, polls, events):
        self.name, self.polls, self.events = name, polls, events
        self.left = None

    def start(self):
        assert self.left is None, f"{self.name} began twice"
        self.left = self.polls
        self.events.append(f"begin {self.name}")

    def test(self):
        assert self.left is not None, f"{self.name} was tested before it began"
        self.left -= 1
        if self.left >= 0:
            return False
        self.left = None
        self.events.append(f"end {self.name}")
        return True

    def wait(self):
        self.events.append(f"wait {self.name}")
        self.left = 0


def slow_pieces(polls):
    """`polls`: of each piece's three requests."""
    events = []
    names = ("summed", "crossed", "spread")
    made = [
        HierarchicalPiece(
            *(Slow(f"{name} {index}", n, events) for name, n in zip(names, each, strict=True))
        )
        for index, each in enumerate(polls)
    ]
    return made, events


times = st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=6)


@settings(deadline=None)
@given(times, st.booleans())
def test_each_request_once_behind_what_it_needs(polls, waits):
    made, events = slow_pieces(polls)
    pieces = HierarchicalRequest(made)
    assert pieces.test()  # nothing has begun, nothing is to be waited for
    assert not events
    for _ in range(2):  # it can run again
        events.clear()
        pieces.start()
        if waits:
            pieces.wait()
        else:
            assert any(pieces.test() for _ in range(1000))
        assert pieces.test()
        for index in range(len(polls)):
            order = [
                events.index(f"{what} {name} {index}")
                for name in ("summed", "crossed", "spread")
                for what in ("begin", "end")
            ]
            assert order == sorted(order)
        begun = [line.removeprefix("begin ") for line in events if line.startswith("begin")]
        assert len(begun) == len(set(begun)) == 3 * len(polls)


@settings(deadline=None)
@given(times)
def test_ranks_begin_in_one_order_whatever_takes_how_long(polls):
    """The team's requests, and the lists, which take their tags when they begin."""
    made, events = slow_pieces(polls)
    HierarchicalRequest(made).run()
    within = [
        line.removeprefix("begin ") for line in events if "begin" in line and "crossed" not in line
    ]
    n = len(polls)
    ahead = itertools.chain.from_iterable((f"summed {i + 1}", f"spread {i}") for i in range(n - 1))
    assert within == ["summed 0", *ahead, f"spread {n - 1}"]
    assert [line for line in events if "begin crossed" in line] == [
        f"begin crossed {i}" for i in range(n)
    ]


def test_the_node_works_while_a_piece_is_between_nodes():
    made, events = slow_pieces([(0, 0, 0), (0, ENDLESS, 0), (0, 0, 0)])
    pieces = HierarchicalRequest(made)
    pieces.start()
    assert not pieces.test()
    assert {"end spread 0", "end summed 2"} <= set(events)
    assert "begin crossed 2" not in events


def test_it_waits_inside_a_request_only_where_that_is_alone():
    """What waits in MPI moves no other request on, and another rank may need that."""
    made, events = slow_pieces([(0, 5, 0), (50, 50, 0)])
    HierarchicalRequest(made).run()
    assert [line for line in events if line.startswith("wait")] == [
        "wait summed 1",
        "wait crossed 1",
    ]
    assert events.index("end crossed 0") < events.index("wait summed 1")


def test_what_was_left_early_cannot_begin_again():
    made, _ = slow_pieces([(0, ENDLESS, 0), (0, 0, 0)])
    pieces = HierarchicalRequest(made)
    pieces.start()
    assert not pieces.test()
    with pytest.raises(CommError, match="left before its end"):
        pieces.run()


# ---- real ones ----


class TwoLevels:
    """All-reduces over two levels, where the ranks of one node play several, of `each` ranks or
    fewer.
    """

    def __init__(self, comm, each):
        even = comm.size % each == 0
        team = comm.Split(comm.rank // each, comm.rank)
        leads = team.rank == 0
        across = comm.Split(team.rank if even else int(leads), comm.rank)
        self.comms = (team, across)
        self.node = NodeTeam.create(team, pytest.fail)
        tags = itertools.count(1).__next__
        ranks = range(comm.size)
        layout = NodeMap(tuple(tuple(ranks[first : first + each]) for first in ranks[::each]), True)
        self.builder = Dispatcher(comm, self.node, across if even or leads else None, layout, tags)

    def build(self, array, op="sum", fixed_order=False, out=None):
        source = as_buffer(array)
        wish = CollectiveCall("allreduce", op, algorithm="two-level", fixed_order=fixed_order)
        return self.builder.build(
            wish, "two-level", source, source if out is None else as_buffer(out)
        )


@pytest.fixture(scope="module", params=[1, 2])
def levels(comm, request):
    if comm.size <= request.param or not map_nodes(comm).on_one_node:
        pytest.skip("needs several nodes' worth of ranks that share memory")
    made = TwoLevels(comm, request.param)
    yield made
    for part in made.comms:
        part.Free()


@pytest.fixture
def small_pieces(monkeypatch):
    """2^20 + 3 elements of float32 make 13."""
    monkeypatch.setattr(dispatch, "PIECE_BYTES", 300_000)


def values(count, rank, turn=0):
    return np.random.default_rng([count, rank, turn]).standard_normal(count).astype(np.float32)


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
@pytest.mark.parametrize("count", [0, 1, 5, 100_000, LONG])
def test_sums_over_two_levels(small_pieces, comm, levels, count, op):
    array, out = values(count, comm.rank), np.zeros(count, np.float32)
    kept = array.copy()
    levels.build(array, op, out=out).run()
    rows = np.array([values(count, rank) for rank in range(comm.size)], np.float64)
    expected = {"sum": rows.sum, "mean": rows.mean, "max": rows.max}[op](0)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert (array == kept).all()


def test_cut_in_pieces_or_not_it_gives_the_same_bits(small_pieces, comm, levels, monkeypatch):
    cut, whole = values(LONG, comm.rank), values(LONG, comm.rank)
    levels.build(cut, fixed_order=True).run()
    monkeypatch.setattr(dispatch, "MOST_PIECES", 1)
    levels.build(whole, fixed_order=True).run()
    assert cut.tobytes() == whole.tobytes()


def test_pieces_of_memory_that_the_node_shares(small_pieces, comm, levels):
    """Pieces are summed where they lie, at any place of the rows."""
    rows = levels.node.allocate(LONG, "float32", pytest.fail)
    sums = levels.build(rows.buffer)
    for turn in range(3):
        rows.own[:] = values(LONG, comm.rank, turn)
        private = rows.own.copy()
        sums.run()
        levels.build(private).run()
        np.testing.assert_allclose(rows.own, private, rtol=1e-5, atol=1e-5)
        comm.Barrier()  # others read this row until here
    rows.free()


def test_ranks_that_test_meet_ranks_that_wait(small_pieces, comm, levels):
    array = np.empty(LONG, np.float32)
    request = levels.build(array)
    for turn in range(4):
        array[:] = comm.rank + turn
        if (comm.rank + turn) % 2:
            request.run()
        else:
            request.start()
            while not request.test():
                pass
        assert (array == sum(rank + turn for rank in range(comm.size))).all()


def test_pieces_are_few_for_many_ranks():
    """A piece leaves each rank's block of a stripe a segment at least."""
    for nbytes, ranks in itertools.product((0, 1, 10**5, 10**6, 10**8, 10**10), (2, 4, 64, 4096)):
        pieces = dispatch._pieces(nbytes, ranks)
        assert 1 <= pieces <= dispatch.MOST_PIECES
        assert pieces == 1 or nbytes // pieces >= max(
            dispatch.PIECE_BYTES, ranks * dispatch.SEGMENT_BYTES
        )
    assert dispatch._pieces(10**8, 4) == dispatch.MOST_PIECES
