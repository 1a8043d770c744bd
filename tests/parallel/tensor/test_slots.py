"""Slots of shared memory: chosen alike by ranks that free them at other times, never too early."""

import gc
import random
import time
import weakref

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpillm.comm.communicator import Communicator
from mpillm.comm.mesh import Axis
from mpillm.machine.node_map import map_nodes
from mpillm.parallel.tensor import shared_streams, slots
from mpillm.parallel.tensor.shared_streams import SharedStreams
from mpillm.parallel.tensor.stream import TensorStream
from mpillm.parallel.tensor.stream_split import choose_split

ROUNDS, WIDTH = 120, 8


def numbered(rank: int, number: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, 1000.0 * number + rank)


def test_a_slot_is_written_again_when_all_have_read_it(comm: MPI.Intracomm) -> None:
    """Ranks keep streams for other times, and are late at other places."""
    if comm.size == 1:
        pytest.skip("no other rank could be late")
    group = Communicator(comm)
    split = choose_split(comm.size, 3, comm.size)
    nbytes = comm.size * 3 * WIDTH * 4
    streams = SharedStreams.create(comm, nbytes, group.prepare("barrier").bare)
    assert isinstance(streams, SharedStreams)
    draw, kept, shape = random.Random(comm.rank), [], (1, 3, WIDTH)

    def check(number: int, held: torch.Tensor) -> None:
        for rank, row in enumerate(held):
            assert torch.equal(row, numbered(rank, number, shape)[0])

    for number in range(ROUNDS):
        whole = streams.gather(numbered(comm.rank, number, shape), split)
        assert whole is not None
        kept.append((number, whole))
        time.sleep(draw.choice((0, 0, 0, 1e-3, 3e-3)))
        draw.shuffle(kept)
        while len(kept) > draw.randrange(8):
            check(*kept.pop())
        # Cycles free a stream whenever the collector runs.
        cycle = [whole]
        cycle.append(cycle)  # type: ignore[arg-type]
        del whole, cycle
        if draw.random() < 0.2:
            gc.collect()
        total = streams.reduce(numbered(0, number, (comm.size, 3, WIDTH)), split)
        time.sleep(draw.choice((0, 0, 0, 2e-3)))
        assert torch.equal(total, torch.full(shape, 1000.0 * number * comm.size))
    # Each rank had at most eight at a time, and what waited for the collector.
    assert len(streams.slots) < ROUNDS
    assert comm.allgather(len(streams.slots)) == [len(streams.slots)] * comm.size
    group.free()


def test_streams_without_room_go_by_messages(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    if comm.size == 1:
        pytest.skip("no other rank needs a message")
    node_map, said = map_nodes(comm), []
    group = Communicator(comm, node_map=node_map)
    axis = Axis("tensor", comm.size, comm.rank, comm, node_map)
    own = numbered(comm.rank, 1, (2, 3, WIDTH))
    expected = torch.cat([numbered(rank, 1, (2, 3, WIDTH)) for rank in range(comm.size)])

    def full(*_: object) -> str:
        return "no room left"

    # A second slot finds no room; then not even the first.
    for module in (slots, shared_streams):
        stream = TensorStream(axis, group, said.append)
        stream.enter(2 * comm.size, 3, own.nbytes * comm.size)
        first = stream.gather(own, stream.split)
        with monkeypatch.context() as patch:
            patch.setattr(module, "share_segment", full)
            stream.enter(2 * comm.size, 3, own.nbytes * comm.size + 8 * (module is shared_streams))
            assert stream.is_shared == (module is slots)
            second = stream.gather(own, stream.split)
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)
        third = stream.gather(own, stream.split)
        assert torch.equal(third, expected)
        stream.close()
    # Once for the missing slot, and once for the first.
    assert len(said) == 2 * (comm.rank == 0)
    if said:
        assert f"no room left (held: 1 × {expected.nbytes:,} bytes)" in said[0]
    group.free()


def test_a_pool_names_a_free_slot(comm: MPI.Intracomm) -> None:
    pool = slots.SlotPool.create(comm, 64)
    assert isinstance(pool, slots.SlotPool)

    def take() -> np.ndarray:
        taken = pool.take(np.float32)
        pool.name_next()
        comm.Barrier()
        return taken

    one, other = take(), take()
    assert len(pool) == 2
    address = one.ctypes.data
    del one
    # The name of the third was chosen before the first was free.
    third, fourth = take(), take()
    assert len(pool) == 3
    assert fourth.ctypes.data == address
    del other, third


def test_a_closed_stream_lets_go_of_its_memory(comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        pytest.skip("an axis of one rank shares nothing")
    node_map = map_nodes(comm)
    group = Communicator(comm, node_map=node_map)
    stream = TensorStream(Axis("tensor", comm.size, comm.rank, comm, node_map), group)
    own = numbered(comm.rank, 1, (1, 3, WIDTH))
    stream.enter(comm.size, 3, own.nbytes * comm.size)
    stream.gather(own, stream.split)
    stream.reduce(own.repeat(comm.size, 1, 1), stream.split)
    held = weakref.ref(stream._shared[own.nbytes * comm.size])
    stream.close()
    assert held() is None
    group.free()
