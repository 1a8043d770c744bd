"""Exchanges of unequal blocks, compared with blocks that all ranks know; late ranks too."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from mpillm.comm.mesh import Axis
from mpillm.machine.node_map import NodeMap
from mpillm.parallel.expert.token_exchange import TokenExchange
from mpillm.parallel.expert.token_routes import TokenRoutes

EXPERTS, WIDTH = 12, 5
WAYS = ["shared", "messages"]


@pytest.fixture(params=WAYS)
def exchange(request: pytest.FixtureRequest, comm: MPI.Intracomm) -> Iterator[TokenExchange]:
    """An exchange on one node, or with a node for each rank."""
    apart = NodeMap(tuple((rank,) for rank in range(comm.size)))
    nodes = None if request.param == "shared" else apart
    made = TokenExchange(Axis("experts", comm.size, comm.rank, comm, nodes), EXPERTS)
    assert made.is_shared == (request.param == "shared" and comm.size > 1)
    yield made
    made.close()


def drawn(ranks: int, seed: int, most: int) -> np.ndarray:
    """Draw the counts of all ranks: unequal, some of them 0; in every third all of one rank."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(0, most + 1, (ranks, EXPERTS)) * draw.integers(0, 2, (ranks, EXPERTS))
    if seed % 3 == 2:
        counts[draw.integers(ranks)] = 0
    return counts


def rows_of(rank: int, counts: np.ndarray, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Make the rows of a rank: the first column names rank, the second the expert."""
    total = int(counts[rank].sum())
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    rows = torch.rand((total, WIDTH), generator=generator)
    rows[:, 0] = rank
    rows[:, 1] = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(counts[rank]))
    return rows.to(dtype)


def for_owner(owner: int, counts: np.ndarray, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Make what an owner receives: by expert, then by sender."""
    ranks = len(counts)
    each = EXPERTS // ranks
    rows = [rows_of(rank, counts, dtype, seed) for rank in range(ranks)]
    found = [
        of_rank[of_rank[:, 1] == expert]
        for expert in range(owner * each, (owner + 1) * each)
        for of_rank in rows
    ]
    return torch.cat(found)


def check(exchange: TokenExchange, counts: np.ndarray, dtype: torch.dtype, seed: int) -> None:
    """Send rows to the owners and twice of them back."""
    rank = exchange.rank
    own = rows_of(rank, counts, dtype, seed)
    routes = exchange.routes(counts[rank].tolist())
    arrived = exchange.to_owners(own, routes)
    assert torch.equal(arrived, for_owner(rank, counts, dtype, seed))
    assert (
        routes.counts_of(rank)
        == counts.reshape(len(counts), len(counts), -1)[:, rank].sum(0).tolist()
    )
    back = exchange.to_senders(2 * arrived, routes)
    assert torch.equal(back, 2 * own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_reach_their_owner_and_come_back(exchange: TokenExchange, dtype: torch.dtype) -> None:
    # Inboxes grow, and are then larger than they must be.
    for seed, most in enumerate((0, 3, 50, 7, 300, 1)):
        check(exchange, drawn(exchange.size, seed, most), dtype, seed)


def test_all_rows_may_go_to_one_owner(exchange: TokenExchange) -> None:
    counts = np.zeros((exchange.size, EXPERTS), np.int64)
    counts[:, 0] = 40
    check(exchange, counts, torch.float32, 1)


def test_rows_with_gaps_are_sent_as_they_are(exchange: TokenExchange) -> None:
    counts = np.full((exchange.size, EXPERTS), 2)
    routes = exchange.routes(counts[exchange.rank].tolist())
    whole = rows_of(exchange.rank, counts, torch.float32)
    gaps = torch.stack([whole, whole], 2)[..., 0]
    assert not gaps.is_contiguous()
    back = exchange.to_senders(exchange.to_owners(gaps, routes), routes)
    assert torch.equal(back, whole)


@pytest.mark.parametrize("late", ["write", "read"])
def test_no_rank_overtakes_a_late_one(
    exchange: TokenExchange, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank in turn sleeps before it writes, or before it reads what others have written."""
    meet, turn = exchange._meet, [0]

    def slow() -> None:
        sleeps = turn[0] % exchange.size == exchange.rank
        turn[0] += 1
        if sleeps and late == "write":
            time.sleep(0.02)
        meet()
        if sleeps and late == "read":
            time.sleep(0.02)

    monkeypatch.setattr(exchange, "_meet", slow)
    # Without a message in between, and the same room each time: nothing else keeps ranks apart.
    for seed in range(8):
        counts = np.full((exchange.size, EXPERTS), 9)
        counts[:, seed % EXPERTS] = 20
        check(exchange, counts, torch.float32, seed)


def test_a_waiting_rank_makes_progress_for_others(
    exchange: TokenExchange, comm: MPI.Intracomm
) -> None:
    """Rank 0 comes after a message that the last rank sends from inside of its wait alone."""
    if comm.size == 1:
        pytest.skip("one rank waits for no other")
    last, sent = comm.size - 1, []

    def progress() -> None:
        if comm.rank == last and not sent:
            sent.append(comm.isend("go on", 0, 7))

    exchange.progress = progress
    if comm.rank == 0:
        assert comm.recv(source=last, tag=7) == "go on"
    check(exchange, np.full((comm.size, EXPERTS), 3), torch.float32, 0)
    for request in sent:
        request.wait()


def test_without_room_rows_go_by_messages(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = TokenExchange(Axis("experts", comm.size, comm.rank, comm), EXPERTS)
    monkeypatch.setattr(exchange._group, "allocate", lambda count, element, instead: None)
    check(exchange, np.full((comm.size, EXPERTS), 3), torch.float32, 0)
    assert not exchange.is_shared
    check(exchange, np.full((comm.size, EXPERTS), 4), torch.float32, 1)
    exchange.close()


def test_routes_are_the_same_on_all_ranks(exchange: TokenExchange, comm: MPI.Intracomm) -> None:
    counts = drawn(comm.size, 4, 9)
    routes = exchange.routes(counts[comm.rank].tolist())
    expected = TokenRoutes(counts)
    assert routes.block_rows.tolist() == expected.block_rows.tolist()
    assert [routes.counts_of(n) for n in range(comm.size)] == [
        expected.counts_of(n) for n in range(comm.size)
    ]
