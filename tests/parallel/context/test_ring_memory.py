"""The rows of a ring: no rank writes what another still reads, however late ranks are."""

import time

import pytest
import torch

from mpillm.comm.communicator import Communicator
from mpillm.models.layers.attention import Pattern
from mpillm.parallel.context.ring_attention import Ring
from mpillm.parallel.context.ring_memory import RingMemory
from tests.parallel.context.context_inputs import axis_of, largest_error


@pytest.mark.parametrize("nodes", [None, [(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)]], ids=str)
@pytest.mark.parametrize("late", [0, 1])
def test_delays_change_nothing(comm, monkeypatch, nodes, late):
    """A rank is late at each place where it waits for others, in an order that each rank draws."""
    if nodes and comm.size != 4:
        pytest.skip("these nodes have four ranks")
    generator = torch.Generator().manual_seed(comm.rank + 10 * late)

    def delayed(method):
        def call(self, *given):
            if comm.rank % 2 == late or torch.rand((), generator=generator) < 0.3:
                time.sleep(0.004 * float(torch.rand((), generator=generator)))
            found = method(self, *given)
            if torch.rand((), generator=generator) < 0.3:
                time.sleep(0.002)
            return found

        return call

    for name in ("barrier", "keys_values", "sums", "pass_on", "arrived"):
        monkeypatch.setattr(RingMemory, name, delayed(getattr(RingMemory, name)))
    length = 4 * comm.size
    ring = Ring(axis_of(comm, nodes), 2 * 2 * 4 * 2 * 8, 4)
    error = largest_error(ring.attend, comm, (2, length, 4, 2, 8), Pattern(), turns=4)
    ring.close()
    assert error <= 1e-6


def test_without_room_each_rank_is_a_node(comm, monkeypatch):
    monkeypatch.setattr(Communicator, "allocate", lambda self, count, element, instead: None)
    memory = RingMemory(axis_of(comm), 64, 16)
    assert [list(ranks) for ranks in memory.nodes] == [[rank] for rank in range(comm.size)]
    memory.close()


def test_uneven_nodes_pass_messages(comm):
    if comm.size != 3:
        pytest.skip("two nodes of two ranks and one")
    memory = RingMemory(axis_of(comm, [(0, 1), (2,)]), 64, 16)
    assert len(memory.nodes) == 3
    memory.close()
