"""The interpreter, and the lock step: any schedule, whole or in segments, waiting or not, at any number of ranks."""

import gc
import random
import time
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpillm.comm.algorithms.catalog import (
    ALGORITHMS,
    FIXED_ORDER,
    CollectiveSchedule,
    Transfer,
    block_bounds,
    schedule,
    sent_elements,
    tree_split,
)
from mpillm.comm.buffers import as_buffer
from mpillm.comm.executors.blockwise import BlockwiseExecutor, make_steps
from mpillm.comm.executors.segmented import KEPT_BYTES, Scratch, SegmentedExecutor
from mpillm.errors import CommError

PAIRS = [(operation, algorithm) for operation, lists in ALGORITHMS.items() for algorithm in lists]
REDUCING = [pair for pair in PAIRS if pair[0] in ("allreduce", "reduce_scatter", "reduce")]
COUNTS = [0, 1, 2, 5, 23, 100, 3001]
PIECES = "lock step in pieces"
SEGMENTS = ["lock step", PIECES, None, 8, 64, 4096]


class Rendezvous(MPI.Intracomm):
    """A send completes only once its receive has begun, whatever its size: nothing is hidden by eager messages."""

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
    moved=lambda: None,
):
    plan = schedule(operation, algorithm, comm.rank, comm.size, root)
    source = as_buffer(array)
    memory = (comm, source, source if target is None else as_buffer(target))
    if segment_bytes in ("lock step", PIECES):
        return BlockwiseExecutor(
            plan, *memory, op, Scratch(), moved, 24 if segment_bytes == PIECES else None
        )
    bounds = block_bounds(source.count, plan.blocks)
    added_bytes = None
    if segment_bytes == "pieces":
        segment_bytes, added_bytes = None, 24
    return SegmentedExecutor(
        plan.rounds,
        *memory,
        bounds,
        op,
        segment_bytes,
        in_flight,
        moved=moved,
        added_bytes=added_bytes,
    )


def begin(*arguments, tag=0, **settings):
    steps = make(*arguments, **settings)
    steps.begin(tag)
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
        assert run.progress()
        assert run.sent_bytes == 8 * sent_elements(
            operation, algorithm, comm.rank, comm.size, count, root
        )
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


@pytest.mark.parametrize("in_flight", ["lock step", PIECES, 1, 2, 5])
@pytest.mark.parametrize(
    ("operation", "algorithm"), [pair for pair in PAIRS if pair[0] != "alltoall"]
)
def test_no_rank_waits_in_a_circle(comm, operation, algorithm, in_flight):
    """Under rendezvous, with ranks late by turns, many segments, and an array that each run changes for the next."""
    strict, late = Rendezvous(comm), random.Random(comm.rank)
    for turn in range(4):
        array, expected, where = prepared(operation, 100, comm.rank, comm.size)
        way = (
            {"segment_bytes": 16, "in_flight": in_flight}
            if type(in_flight) is int
            else {"segment_bytes": in_flight}
        )
        run = begin(strict, operation, algorithm, array, **way)
        while turn % 2 and not run.progress():
            time.sleep(late.choice([0, 0, 0.0002]))
        run.wait()
        np.testing.assert_array_equal(array[where], expected[where])


@pytest.mark.parametrize("segment_bytes", ["lock step", PIECES, 32])
@pytest.mark.parametrize("op", ["max", "min", "sum"])
@pytest.mark.parametrize(("operation", "algorithm"), REDUCING)
def test_every_way_to_combine(comm, operation, algorithm, op, segment_bytes):
    rows = np.array([values(23, rank) for rank in range(comm.size)])
    array = rows[comm.rank].copy()
    begin(comm, operation, algorithm, array, op=op, segment_bytes=segment_bytes).wait()
    where = prepared(operation, 23, comm.rank, comm.size)[2]
    np.testing.assert_array_equal(array[where], getattr(rows, op)(axis=0)[where])


@pytest.mark.parametrize("segment_bytes", SEGMENTS)
@pytest.mark.parametrize("algorithm", sorted(FIXED_ORDER & set(ALGORITHMS["allreduce"])))
def test_one_order_one_sum(comm, algorithm, segment_bytes):
    """Numbers whose sum depends on the order of adding come out bitwise as in the canonical tree."""
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


@pytest.mark.parametrize("segment_bytes", ["lock step", PIECES, 15])
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
    """What was made once runs any number of times, over what lies in the array then."""
    memory = np.empty(100)
    steps = make(comm, operation, algorithm, memory, segment_bytes=segment_bytes)
    sent = []
    for turn in range(3):
        array, expected, where = prepared(operation, 100, comm.rank, comm.size)
        memory[:] = array * (turn + 1)
        steps.begin(tag=turn)
        if turn == 1:
            while not steps.progress():
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
            buffer,
            buffer,
            "sum",
            Scratch(0),
        )
        for turn in (1, 2):
            before = tracemalloc.get_traced_memory()[0]
            steps.begin()
            steps.wait()
            assert (array == comm.size**turn).all()
            assert tracemalloc.get_traced_memory()[0] - before < 2**15
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ways", [("lock step", None), (PIECES, "pieces")])
@pytest.mark.parametrize(
    ("operation", "algorithm"), [pair for pair in PAIRS if pair[0] != "alltoall"]
)
def test_some_ranks_in_lock_step(comm, operation, algorithm, ways):
    """Messages match, of whole blocks or in pieces where they are added, however each rank goes through its rounds."""
    for odd in (0, 1):
        array, expected, where = prepared(operation, 101, comm.rank, comm.size)
        kind = ways[comm.rank % 2 == odd]
        begin(comm, operation, algorithm, array, segment_bytes=kind).wait()
        np.testing.assert_array_equal(array[where], expected[where])


def test_which_way_is_taken(comm):
    buffer = as_buffer(np.zeros(1000))
    plan = schedule("allreduce", "recursive-doubling", 0, 4)
    ways = {
        size: make_steps(plan, comm, buffer, buffer, "sum", size, 2, Scratch())
        for size in (None, 8000, 7999, 8)
    }
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
    ways = {
        size: make_steps(wide, comm, buffer, buffer, "sum", size, 2, Scratch())
        for size in (4000, 3999)
    }
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
    steps = make_steps(
        plan, comm, buffer, buffer, "sum", 8 * 30, 2, scratch, added_bytes=added_bytes
    )
    steps.begin(1)
    steps.wait()
    np.testing.assert_array_equal(array[where], expected[where])


@pytest.mark.parametrize("added_bytes", [None, 64])
def test_two_in_turn_through_one_scratch_memory(comm, added_bytes):
    """Each finds what the other left: the messages of a shorter one are cut from a longer piece, and the other way."""
    arrays, scratch = [np.ones(count) for count in (100, 1000, 10)], Scratch()
    plan = schedule("allreduce", "rabenseifner", comm.rank, comm.size)
    buffers = [as_buffer(array) for array in arrays]
    steps = [
        BlockwiseExecutor(plan, comm, buffer, buffer, "sum", scratch, added_bytes=added_bytes)
        for buffer in buffers
    ]
    for turn in range(1, 4):
        for each, array in zip(steps, arrays, strict=True):
            each.begin()
            each.wait()
            assert (array == comm.size**turn).all()


@pytest.mark.parametrize("segment_bytes", ["lock step", PIECES, 64])
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


@pytest.mark.parametrize("segment_bytes", ["lock step", PIECES, 64])
def test_what_was_left_early_cannot_begin_again(comm, segment_bytes):
    steps = begin(Rendezvous(comm), "allreduce", "ring", np.ones(1000), segment_bytes=segment_bytes)
    if comm.size > 1:
        with pytest.raises(CommError, match="left before its end"):
            steps.begin(1)
    steps.wait()


def test_scratch_keeps_what_fits():
    scratch, like, other = Scratch(), as_buffer(np.zeros(4)), as_buffer(np.zeros(4, np.float32))
    first = scratch.borrow(like, 100)
    assert scratch.give_back(first)
    assert scratch.borrow(other, 10) is not first
    assert scratch.borrow(like, 100) is first
    scratch.give_back(first)
    assert scratch.borrow(like, 101).count == 101
    assert not scratch.give_back(as_buffer(np.empty(KEPT_BYTES + 1, np.uint8)))
    assert scratch.borrow(as_buffer(np.zeros(1, np.uint8)), 1).count == 1
    fleeting = Scratch(kept_bytes=0)
    assert not fleeting.give_back(first)
    assert fleeting.borrow(like, 1) is not first


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
    while not all([runs[which].progress() for which in order]):  # noqa: C419 - each must be carried on
        pass
    for array, whole in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array, whole)


@pytest.mark.parametrize("segment_bytes", ["lock step", PIECES, 64])
def test_progress_never_waits(comm, segment_bytes):
    """The last rank begins only when all others have called progress in vain."""
    array, last = np.ones(1000), comm.size - 1
    if comm.rank != last:
        run = begin(comm, "allreduce", "ring", array, segment_bytes=segment_bytes)
        assert not run.progress()
        assert not run.progress()
        comm.send(None, last, tag=1)
    else:
        for rank in range(last):
            comm.recv(source=rank, tag=1)
        run = begin(comm, "allreduce", "ring", array, segment_bytes=segment_bytes)
    run.wait()
    assert (array == comm.size).all()


@pytest.mark.parametrize("segment_bytes", ["lock step", 4096])
def test_who_looks_is_told_of_what_moved(comm, segment_bytes):
    looks, moved, array = [], [], np.ones(20_000)
    comm.Barrier()
    run = begin(
        comm,
        "allreduce",
        "ring",
        array,
        segment_bytes=segment_bytes,
        moved=lambda: moved.append(len(looks)),
    )
    if comm.rank == 0:
        time.sleep(0.05)
    while not run.progress():
        looks.append(run.received_bytes)
    assert moved or comm.size == 1
    assert len(moved) < len(looks) or comm.rank == 0 or comm.size == 1
    # Whatever was posted between two looks, it was told in the second of them.
    for look in range(1, len(looks)):
        assert looks[look] == looks[look - 1] or look in moved


def test_two_rounds_are_open_at_most(comm):
    """A rank that all others keep waiting has posted no more than two partners' blocks."""
    source, target = np.ones((comm.size, 10)), np.zeros((comm.size, 10))
    if comm.rank:
        comm.Barrier()
    run = begin(Rendezvous(comm), "alltoall", "pairwise", source, target=target)
    if comm.rank == 0:
        assert not run.progress() or comm.size == 1
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

    def borrow(self, like, count):
        self.longest = max(self.longest, count)
        return super().borrow(like, count)


@pytest.mark.parametrize("added_bytes", [2**10, 2**17])
@pytest.mark.parametrize(("operation", "algorithm"), REDUCING)
def test_pieces_need_little_scratch_memory(comm, operation, algorithm, added_bytes):
    """That of two pieces, unless a round sums over what it sends: then all that arrives waits until that has left."""
    array, expected, where = prepared(operation, 2**16, comm.rank, comm.size)
    buffer, scratch = as_buffer(array), NotedScratch()
    plan = schedule(operation, algorithm, comm.rank, comm.size)
    steps = BlockwiseExecutor(plan, comm, buffer, buffer, "sum", scratch, added_bytes=added_bytes)
    steps.begin()
    steps.wait()
    np.testing.assert_array_equal(array[where], expected[where])
    assert 8 * scratch.longest <= (array.nbytes if plan.sums_over_sent else 2 * added_bytes)
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
    run = SegmentedExecutor(rounds, comm, buffer, buffer, [0, 1000], segment_bytes=256)
    run.begin()
    run.wait()
    assert (array == 0).all()


def by_run(comm, buffer, rounds):
    return SegmentedExecutor(rounds, comm, buffer, buffer, block_bounds(buffer.count, 2))


def by_lock_step(comm, buffer, rounds):
    return BlockwiseExecutor(
        CollectiveSchedule(2, tuple(rounds)), comm, buffer, buffer, "sum", Scratch()
    )


@pytest.mark.parametrize("way", [by_run, by_lock_step])
@pytest.mark.parametrize(("block", "opened_bytes"), [(0, 0), (1, 256)])
def test_no_receive_opens_over_what_has_not_left(comm, block, opened_bytes, way):
    """Block 0 is sent, then a block received: over block 0 only once the late partner has taken it."""
    other = comm.rank ^ 1
    if other >= comm.size:
        return
    array = np.full(64, float(comm.rank))
    buffer = as_buffer(array)
    send, receive = (Transfer(other, 0, "send"),), (Transfer(other, block, "copy"),)
    if comm.rank % 2:
        comm.recv(source=other, tag=1)
        run = way(Rendezvous(comm), buffer, [(Transfer(other, 1, "copy"),), send])
        run.begin()
        run.wait()
        assert (array == np.repeat([comm.rank, other], 32)).all()
    else:
        run = way(Rendezvous(comm), buffer, [send, receive])
        run.begin()
        assert not run.progress()
        assert (run.sent_bytes, run.received_bytes) == (256, opened_bytes)
        comm.send(None, other, tag=1)
        run.wait()
        assert (array[32 * block : 32 * block + 32] == other).all()


@pytest.mark.parametrize("added_bytes", [256, 40])
def test_no_sum_goes_over_what_has_not_left(comm, added_bytes):
    """Block 0 is sent, then pieces come to be added to it: only once the late partner has taken the block."""
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
        buffer,
        buffer,
        "sum",
        Scratch(),
        added_bytes=added_bytes,
    )
    steps.begin()
    comm.recv(source=other, tag=1)
    assert not any(steps.progress() for _ in range(100))
    assert (array == comm.rank + 1).all()
    comm.send(None, other, tag=1)
    steps.wait()
    assert (array == np.repeat([comm.rank + other + 2, comm.rank + 1], 32)).all()
