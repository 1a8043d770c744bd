"""The interpreter, and the blockwise executor: any schedule, whole or in segments, waiting or not,
at any number of ranks.
"""

import gc
import itertools
import random
import time
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpillm.comm.algorithms.algorithm_catalog import algorithms_of, load_algorithm, schedule
from mpillm.comm.algorithms.schedule import CollectiveSchedule, Transfer, block_bounds
from mpillm.comm.algorithms.trees import tree_split
from mpillm.comm.buffers import as_buffer
from mpillm.comm.executors.blockwise import BlockwiseExecutor, make_executor
from mpillm.comm.executors.request import Operands
from mpillm.comm.executors.segmented import KEPT_BYTES, Scratch, Segmentation, SegmentedExecutor
from mpillm.comm.selection import OPERATIONS
from mpillm.errors import CommError

PAIRS = [
    (operation, algorithm) for operation in OPERATIONS for algorithm in algorithms_of(operation)
]
REDUCING = [pair for pair in PAIRS if pair[0] in ("allreduce", "reduce_scatter", "reduce")]
COUNTS = [0, 1, 2, 5, 23, 100, 3001]
PIECES = "blockwise in pieces"
SEGMENTS = ["blockwise", PIECES, None, 8, 64, 4096]


class Rendezvous(MPI.Intracomm):
    """A send completes only once its receive has begun, whatever its size: nothing is hidden by
    eager messages.
    """

    def Isend(self, *arguments):  # noqa: N802 - MPI's own name
        return self.Issend(*arguments)


def make(
    comm,
    operation,
    algorithm,
    array,
    root=0,
    target=None,
    segment_bytes=None,
    in_flight=2,
    op="sum",
    next_tag=lambda: 0,
):
    plan = schedule(operation, algorithm, comm.rank, comm.size, root)
    source = as_buffer(array)
    operands = Operands(source, source if target is None else as_buffer(target), op, root)
    if segment_bytes in ("blockwise", PIECES):
        pieces = Segmentation(added_bytes=24 if segment_bytes == PIECES else None)
        return BlockwiseExecutor(plan, comm, operands, pieces, Scratch(), next_tag)
    added_bytes = None
    if segment_bytes == "pieces":
        segment_bytes, added_bytes = None, 24
    segmentation = Segmentation(segment_bytes, in_flight, added_bytes)
    return SegmentedExecutor(plan, comm, operands, segmentation, next_tag=next_tag)


def begin(*arguments, tag=0, **settings):
    steps = make(*arguments, next_tag=lambda: tag, **settings)
    steps.start()
    return steps


def values(count, rank):
    return np.random.default_rng([count, rank]).integers(-1000, 1000, count).astype(float)


def prepared(operation, count, rank, size, root=0):
    """(the array before, what must be right after, where) on `rank`."""
    rows = [values(count, each) for each in range(size)]
    bounds = block_bounds(count, size)
    everywhere, own = slice(None), slice(bounds[rank], bounds[rank + 1])
    if operation == "allgather":
        array = np.full(count, np.nan)
        array[own] = rows[0][own]
        return array, rows[0], everywhere
    if operation == "broadcast":
        return rows[rank], rows[root], everywhere
    where = {
        "allreduce": everywhere,
        "reduce_scatter": own,
        "reduce": everywhere if rank == root else slice(0),
    }
    return rows[rank].copy(), np.sum(rows, axis=0), where[operation]


@pytest.mark.parametrize("segment_bytes", SEGMENTS)
@pytest.mark.parametrize(
    ("operation", "algorithm"), [pair for pair in PAIRS if pair[0] != "alltoall"]
)
def test_every_list(comm, operation, algorithm, segment_bytes):
    for turn, count in enumerate(COUNTS):
        root = turn % comm.size if operation in ("broadcast", "reduce") else 0
        array, expected, where = prepared(operation, count, comm.rank, comm.size, root)
        run = begin(comm, operation, algorithm, array, root, segment_bytes=segment_bytes, tag=turn)
        run.wait()
        np.testing.assert_array_equal(array[where], expected[where])
        assert run.test()
        plan = schedule(operation, algorithm, comm.rank, comm.size, root)
        assert run.sent_bytes == 8 * plan.sent_elements(count)
        assert comm.allreduce(run.received_bytes) == comm.allreduce(run.sent_bytes)


@pytest.mark.parametrize("segment_bytes", SEGMENTS)
def test_alltoall(comm, segment_bytes):
    for length in COUNTS[:-1]:
        rows = [
            values(length * comm.size, rank).reshape(comm.size, length) for rank in range(comm.size)
        ]
        source, target = rows[comm.rank], np.full((comm.size, length), np.nan)
        target[comm.rank] = source[comm.rank]
        run = begin(
            comm, "alltoall", "pairwise", source, target=target, segment_bytes=segment_bytes
        )
        run.wait()
        np.testing.assert_array_equal(target, [row[comm.rank] for row in rows])
        assert run.sent_bytes == run.received_bytes == 8 * length * (comm.size - 1)


@pytest.mark.parametrize("in_flight", ["blockwise", PIECES, 1, 2, 5])
@pytest.mark.parametrize(
    ("operation", "algorithm"), [pair for pair in PAIRS if pair[0] != "alltoall"]
)
def test_no_rank_waits_in_a_circle(comm, operation, algorithm, in_flight):
    """Under rendezvous, with ranks late by turns, many segments, and an array that each run changes
    for the next.
    """
    strict, late = Rendezvous(comm), random.Random(comm.rank)
    for turn in range(4):
        array, expected, where = prepared(operation, 100, comm.rank, comm.size)
        way = (
            {"segment_bytes": 16, "in_flight": in_flight}
            if type(in_flight) is int
            else {"segment_bytes": in_flight}
        )
        run = begin(strict, operation, algorithm, array, **way)
        while turn % 2 and not run.test():
            time.sleep(late.choice([0, 0, 0.0002]))
        run.wait()
        np.testing.assert_array_equal(array[where], expected[where])


@pytest.mark.parametrize("segment_bytes", ["blockwise", PIECES, 32])
@pytest.mark.parametrize("op", ["max", "min", "sum"])
@pytest.mark.parametrize(("operation", "algorithm"), REDUCING)
def test_every_way_to_combine(comm, operation, algorithm, op, segment_bytes):
    rows = np.array([values(23, rank) for rank in range(comm.size)])
    array = rows[comm.rank].copy()
    begin(comm, operation, algorithm, array, op=op, segment_bytes=segment_bytes).wait()
    where = prepared(operation, 23, comm.rank, comm.size)[2]
    np.testing.assert_array_equal(array[where], getattr(rows, op)(axis=0)[where])


@pytest.mark.parametrize("segment_bytes", SEGMENTS)
@pytest.mark.parametrize(
    "algorithm", [name for name in algorithms_of("allreduce") if load_algorithm(name).fixed_order]
)
def test_one_order_one_sum(comm, algorithm, segment_bytes):
    """Sums that depend on the order of adding are bitwise those of the canonical tree."""
    rows = [
        np.random.default_rng(rank).standard_normal(999).astype(np.float32) ** 9
        for rank in range(comm.size)
    ]

    def tree(lo, hi):
        return (
            rows[lo]
            if hi - lo == 1
            else tree(lo, tree_split(lo, hi)) + tree(tree_split(lo, hi), hi)
        )

    array = rows[comm.rank].copy()
    begin(comm, "allreduce", algorithm, array, segment_bytes=segment_bytes).wait()
    np.testing.assert_array_equal(array, tree(0, comm.size))


@pytest.mark.parametrize("segment_bytes", ["blockwise", PIECES, 15])
@pytest.mark.parametrize("element", ["bfloat16", "float16", "int8"])
def test_short_elements(comm, element, segment_bytes):
    tensor = torch.full((301,), comm.rank + 1).to(getattr(torch, element))
    begin(comm, "allreduce", "ring", tensor, segment_bytes=segment_bytes).wait()
    assert (tensor == comm.size * (comm.size + 1) // 2).all()


@pytest.mark.parametrize("segment_bytes", SEGMENTS)
@pytest.mark.parametrize(
    ("operation", "algorithm"), [pair for pair in PAIRS if pair[0] != "alltoall"]
)
def test_begun_again_and_again(comm, operation, algorithm, segment_bytes):
    """What was made once runs any number of times, over what the array holds then."""
    memory = np.empty(100)
    tags = itertools.count().__next__
    steps = make(comm, operation, algorithm, memory, segment_bytes=segment_bytes, next_tag=tags)
    sent = []
    for turn in range(3):
        array, expected, where = prepared(operation, 100, comm.rank, comm.size)
        memory[:] = array * (turn + 1)
        steps.start()
        if turn == 1:
            while not steps.test():
                pass
        steps.wait()
        np.testing.assert_array_equal(memory[where], expected[where] * (turn + 1))
        sent.append((steps.sent_bytes, steps.received_bytes))
    assert len(set(sent)) == 1


def test_scratch_that_is_not_kept_is_held_during_a_run_only(comm):
    array = np.ones(2**18)
    buffer = as_buffer(array)
    tracemalloc.start()
    try:
        steps = BlockwiseExecutor(
            schedule("allreduce", "ring", comm.rank, comm.size),
            comm,
            Operands(buffer, buffer),
            scratch=Scratch(0),
        )
        for turn in (1, 2):
            before = tracemalloc.get_traced_memory()[0]
            steps.start()
            steps.wait()
            assert (array == comm.size**turn).all()
            assert tracemalloc.get_traced_memory()[0] - before < 2**15
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ways", [("blockwise", None), (PIECES, "pieces")])
@pytest.mark.parametrize(
    ("operation", "algorithm"), [pair for pair in PAIRS if pair[0] != "alltoall"]
)
def test_some_ranks_by_blocks(comm, operation, algorithm, ways):
    """Messages match, of whole blocks or in pieces where they are added, however each rank goes
    through its rounds.
    """
    for odd in (0, 1):
        array, expected, where = prepared(operation, 101, comm.rank, comm.size)
        kind = ways[comm.rank % 2 == odd]
        begin(comm, operation, algorithm, array, segment_bytes=kind).wait()
        np.testing.assert_array_equal(array[where], expected[where])


def test_which_way_is_taken(comm):
    buffer = as_buffer(np.zeros(1000))

    def choose(plan, size):
        operands = Operands(buffer, buffer)
        return make_executor(plan, comm, operands, Segmentation(size), Scratch(), lambda: 0)

    plan = schedule("allreduce", "recursive-doubling", 0, 4)
    ways = {size: choose(plan, size) for size in (None, 8000, 7999, 8)}
    kinds = {size: type(steps) for size, steps in ways.items()}
    assert kinds == {
        None: BlockwiseExecutor,
        8000: BlockwiseExecutor,
        7999: SegmentedExecutor,
        8: SegmentedExecutor,
    }
    wide = schedule(
        "broadcast", "scatter-allgather", 0, 4
    )  # its first message carries two blocks of four
    ways = {size: choose(wide, size) for size in (4000, 3999)}
    assert {size: type(steps) for size, steps in ways.items()} == {
        4000: BlockwiseExecutor,
        3999: SegmentedExecutor,
    }


@pytest.mark.parametrize("added_bytes", [None, 8 * 7])
@pytest.mark.parametrize(
    ("operation", "algorithm"), [pair for pair in PAIRS if pair[0] != "alltoall"]
)
def test_each_rank_takes_the_way_that_fits_it(comm, operation, algorithm, added_bytes):
    """A segment between one block and the longest message: some ranks cut, others need not."""
    array, expected, where = prepared(operation, 24 * comm.size, comm.rank, comm.size)
    plan, buffer, scratch = (
        schedule(operation, algorithm, comm.rank, comm.size),
        as_buffer(array),
        Scratch(),
    )
    segmentation = Segmentation(8 * 30, added_bytes=added_bytes)
    steps = make_executor(plan, comm, Operands(buffer, buffer), segmentation, scratch, lambda: 1)
    steps.start()
    steps.wait()
    np.testing.assert_array_equal(array[where], expected[where])


@pytest.mark.parametrize("added_bytes", [None, 64])
def test_two_in_turn_through_one_scratch_memory(comm, added_bytes):
    """Each finds what the other left: the messages of a shorter one are cut from a longer piece,
    and the other way.
    """
    arrays, scratch = [np.ones(count) for count in (100, 1000, 10)], Scratch()
    plan = schedule("allreduce", "rabenseifner", comm.rank, comm.size)
    buffers = [as_buffer(array) for array in arrays]
    pieces = Segmentation(added_bytes=added_bytes)
    steps = [
        BlockwiseExecutor(plan, comm, Operands(buffer, buffer), pieces, scratch)
        for buffer in buffers
    ]
    for turn in range(1, 4):
        for each, array in zip(steps, arrays, strict=True):
            each.start()
            each.wait()
            assert (array == comm.size**turn).all()


@pytest.mark.parametrize("segment_bytes", ["blockwise", PIECES, 64])
def test_nothing_keeps_the_array_of_a_call_that_is_done(comm, segment_bytes):
    array = np.ones(1000)
    seen = weakref.ref(array)
    gc.disable()
    try:
        steps = begin(comm, "allreduce", "ring", array, segment_bytes=segment_bytes)
        steps.wait()
        del steps, array
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("segment_bytes", ["blockwise", PIECES, 64])
def test_what_was_left_early_cannot_begin_again(comm, segment_bytes):
    steps = begin(Rendezvous(comm), "allreduce", "ring", np.ones(1000), segment_bytes=segment_bytes)
    if comm.size > 1:
        with pytest.raises(CommError, match="left before its end"):
            steps.start()
    steps.wait()


def test_scratch_keeps_what_fits():
    scratch = Scratch()
    first = scratch.borrow(100)
    scratch.give_back(first)
    assert scratch.borrow(100) is first
    scratch.give_back(first)
    assert scratch.borrow(101).size == 101
    assert scratch.borrow(100) is not first
    scratch.give_back(np.empty(KEPT_BYTES + 1, np.uint8))
    assert scratch.borrow(1).size == 1
    fleeting = Scratch(kept_bytes=0)
    fleeting.give_back(first)
    assert fleeting.borrow(1) is not first


def test_two_runs_at_once(comm):
    """Odd and even ranks carry two runs on in opposite orders; their tags keep them apart."""
    arrays = [values(3001, comm.rank), values(500, comm.rank)]
    expected = [sum(values(len(array), rank) for rank in range(comm.size)) for array in arrays]
    lists = [("ring", 256), ("rabenseifner", 8)]
    order = [0, 1] if comm.rank % 2 else [1, 0]
    runs = {}
    for which in order:
        algorithm, segment_bytes = lists[which]
        runs[which] = begin(
            comm, "allreduce", algorithm, arrays[which], segment_bytes=segment_bytes, tag=10 + which
        )
    while not all([runs[which].test() for which in order]):  # noqa: C419 - each must be carried on
        pass
    for array, whole in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array, whole)


@pytest.mark.parametrize("segment_bytes", ["blockwise", PIECES, 64])
def test_progress_never_waits(comm, segment_bytes):
    """The last rank begins only when all others have tested without success."""
    array, last = np.ones(1000), comm.size - 1
    if comm.rank != last:
        run = begin(comm, "allreduce", "ring", array, segment_bytes=segment_bytes)
        assert not run.test()
        assert not run.test()
        comm.send(None, last, tag=1)
    else:
        for rank in range(last):
            comm.recv(source=rank, tag=1)
        run = begin(comm, "allreduce", "ring", array, segment_bytes=segment_bytes)
    run.wait()
    assert (array == comm.size).all()


def test_two_rounds_are_open_at_most(comm):
    """A rank that all others keep waiting has posted no more than two partners' blocks."""
    source, target = np.ones((comm.size, 10)), np.zeros((comm.size, 10))
    if comm.rank:
        comm.Barrier()
    run = begin(Rendezvous(comm), "alltoall", "pairwise", source, target=target)
    if comm.rank == 0:
        assert not run.test() or comm.size == 1
        assert run.sent_bytes == run.received_bytes == min(2, comm.size - 1) * 80
        comm.Barrier()
    run.wait()
    assert run.sent_bytes == (comm.size - 1) * 80


def test_scratch_memory_is_small(comm):
    array = np.ones(2**20)
    tracemalloc.start()
    try:
        begin(comm, "allreduce", "ring", array, segment_bytes=4096, in_flight=3).wait()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (array == comm.size).all()
    assert peak_bytes < array.nbytes / 16


class NotedScratch(Scratch):
    longest = 0

    def borrow(self, nbytes):
        self.longest = max(self.longest, nbytes)
        return super().borrow(nbytes)


@pytest.mark.parametrize("added_bytes", [2**10, 2**17])
@pytest.mark.parametrize(("operation", "algorithm"), REDUCING)
def test_pieces_need_little_scratch_memory(comm, operation, algorithm, added_bytes):
    """That of two pieces, unless a round sums over what it sends: then all that arrives waits until
    that has left.
    """
    array, expected, where = prepared(operation, 2**16, comm.rank, comm.size)
    buffer, scratch = as_buffer(array), NotedScratch()
    plan = schedule(operation, algorithm, comm.rank, comm.size)
    pieces = Segmentation(added_bytes=added_bytes)
    steps = BlockwiseExecutor(plan, comm, Operands(buffer, buffer), pieces, scratch)
    steps.start()
    steps.wait()
    np.testing.assert_array_equal(array[where], expected[where])
    assert scratch.longest <= (array.nbytes if plan.sums_over_sent else 2 * added_bytes)
    assert not plan.sums_over_sent or algorithm == "recursive-doubling"


def test_a_chain_of_one_sided_rounds(comm):
    """Each rank but the first receives, then each but the last sends what came."""
    receive = (Transfer(comm.rank - 1, 0, "copy"),) if comm.rank else ()
    send = (Transfer(comm.rank + 1, 0, "send"),) if comm.rank + 1 < comm.size else ()
    rounds = [
        receive if turn == comm.rank else send if turn == comm.rank + 1 else ()
        for turn in range(comm.size + 1)
    ]
    array = np.full(1000, comm.rank, np.int32)
    buffer = as_buffer(array)
    plan = CollectiveSchedule(1, tuple(rounds))
    run = SegmentedExecutor(plan, comm, Operands(buffer, buffer), Segmentation(256))
    run.start()
    run.wait()
    assert (array == 0).all()


def by_run(comm, buffer, rounds):
    return SegmentedExecutor(CollectiveSchedule(2, tuple(rounds)), comm, Operands(buffer, buffer))


def by_block(comm, buffer, rounds):
    plan = CollectiveSchedule(2, tuple(rounds))
    return BlockwiseExecutor(plan, comm, Operands(buffer, buffer), scratch=Scratch())


@pytest.mark.parametrize("way", [by_run, by_block])
@pytest.mark.parametrize(("block", "opened_bytes"), [(0, 0), (1, 256)])
def test_no_receive_opens_over_what_has_not_left(comm, block, opened_bytes, way):
    """Block 0 is sent, then a block received: over block 0 only once the late partner has it."""
    other = comm.rank ^ 1
    if other >= comm.size:
        return
    array = np.full(64, float(comm.rank))
    buffer = as_buffer(array)
    send, receive = (Transfer(other, 0, "send"),), (Transfer(other, block, "copy"),)
    if comm.rank % 2:
        comm.recv(source=other, tag=1)
        run = way(Rendezvous(comm), buffer, [(Transfer(other, 1, "copy"),), send])
        run.start()
        run.wait()
        assert (array == np.repeat([comm.rank, other], 32)).all()
    else:
        run = way(Rendezvous(comm), buffer, [send, receive])
        run.start()
        assert not run.test()
        assert (run.sent_bytes, run.received_bytes) == (256, opened_bytes)
        comm.send(None, other, tag=1)
        run.wait()
        assert (array[32 * block : 32 * block + 32] == other).all()


@pytest.mark.parametrize("added_bytes", [256, 40])
def test_no_sum_goes_over_what_has_not_left(comm, added_bytes):
    """Block 0 is sent, then pieces come to be added to it: only once the late partner has taken the
    block.
    """
    other = comm.rank ^ 1
    if other >= comm.size:
        return
    array = np.full(64, comm.rank + 1.0)
    if comm.rank % 2:
        for start in range(0, 256, added_bytes):
            comm.Send(array.view(np.uint8)[start : min(start + added_bytes, 256)], other, 0)
        comm.send(None, other, tag=1)
        comm.recv(source=other, tag=1)
        comm.Recv(array[:32], other, 0)
        assert (array == np.repeat([other + 1, comm.rank + 1], 32)).all()
        return
    rounds = ((Transfer(other, 0, "send"),), (Transfer(other, 0, "add", added=True),))
    buffer = as_buffer(array)
    steps = BlockwiseExecutor(
        CollectiveSchedule(2, rounds),
        Rendezvous(comm),
        Operands(buffer, buffer),
        Segmentation(added_bytes=added_bytes),
    )
    steps.start()
    comm.recv(source=other, tag=1)
    assert not any(steps.test() for _ in range(100))
    assert (array == comm.rank + 1).all()
    comm.send(None, other, tag=1)
    steps.wait()
    assert (array == np.repeat([comm.rank + other + 2, comm.rank + 1], 32)).all()
