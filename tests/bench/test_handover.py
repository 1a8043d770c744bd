"""The path-over's benchmark: messages arrive by each way, all ranks know its rows, and a profile
keeps them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.bench.bench_options import BenchOptions
from mpillm.bench.context import BenchContext
from mpillm.bench.handover import (
    WORK_SECONDS,
    ChannelPath,
    MessagePath,
    RequestPath,
    round_trip,
    run_handover,
    while_computing,
)
from mpillm.bench.make_profile import make_profile
from mpillm.bench.results import Section
from mpillm.comm.channels.channel_set import Channel, ChannelSet
from mpillm.comm.communicator import Communicator
from mpillm.machine.cluster_profile import Cluster, load_profile
from mpillm.machine.node_map import map_nodes
from mpillm.system.console import Console

CLUSTER = Cluster("Made Up 9000", 2, "Open MPI", "5.0.9", 1, 2)


def paths(pair: MPI.Intracomm, nbytes: int) -> dict[str, MessagePath]:
    ways = ("shared", "messages") if map_nodes(pair).on_one_node else ("messages",)
    return {**{way: ChannelPath(pair, nbytes, way) for way in ways}, "mpi": RequestPath(pair)}


@pytest.fixture
def pair(comm: MPI.Intracomm) -> Any:
    """The first two ranks; None on the others."""
    joined = comm.Split(0 if comm.rank < 2 and comm.size > 1 else MPI.UNDEFINED)
    yield None if joined == MPI.COMM_NULL else joined
    if joined != MPI.COMM_NULL:
        joined.Free()


@pytest.mark.parametrize("nbytes", [1, 300_000])
def test_messages_arrive_by_each_way(pair: MPI.Intracomm | None, nbytes: int) -> None:
    if pair is None:
        pytest.skip("needs two ranks")
    for name, path in paths(pair, nbytes).items():
        outgoing, incoming = np.full(nbytes, pair.rank + 1, np.uint8), np.zeros(nbytes, np.uint8)
        for _ in range(3):
            round_trip(path, pair.rank == 0, outgoing, incoming)
            assert (incoming == 2 - pair.rank).all(), name
            incoming[:] = 0
        path.free()


def test_behind_work_both_ranks_know_all(pair: MPI.Intracomm | None) -> None:
    if pair is None:
        pytest.skip("needs two ranks")
    ways, outgoing, incoming = paths(pair, 1000), np.ones(1000, np.uint8), np.zeros(1000, np.uint8)
    arrival, sending = while_computing(pair, ways, outgoing, incoming, 3, 1)
    for found in (arrival, sending):
        assert list(found) == list(ways)
        assert all(seconds.shape == (3,) and (seconds > 0).all() for seconds in found.values())
    everywhere = pair.allgather([seconds.tolist() for seconds in arrival.values()])
    assert everywhere[0] == everywhere[1]
    assert (incoming == pair.rank).all()
    for path in ways.values():
        path.free()


def test_rows_are_the_same_on_every_rank(comm: MPI.Intracomm) -> None:
    group, options = (
        Communicator(comm),
        BenchOptions("handover", sizes="100,70K", iterations=3, warmup=1),
    )
    bench = BenchContext(options, comm, group, Console(speaks=False))
    sections = run_handover(bench)
    group.free()
    rows = [row for section in sections for row in section.rows]
    assert comm.allgather((rows, bench.notes)) == [(rows, bench.notes)] * comm.size
    assert ("mpirun -n 2" in " ".join(bench.notes)) == (comm.size == 1)
    if comm.size > 1 and map_nodes(comm).on_one_node:
        assert [(row["bytes"], row["way"]) for row in rows] == [
            (size, way) for size in (100, 71680) for way in ("shared", "messages", "mpi")
        ]
    for row in rows:
        assert row["work_seconds"] == WORK_SECONDS
        for key in ("half_round_trip_seconds", "behind_work_seconds", "sender_seconds"):
            assert row[f"{key}_q1"] <= row[key] <= row[f"{key}_q3"]
        assert all(show(row) for show in sections[0].columns.values())
    for way, cost in make_profile(
        sections, CLUSTER, comm.size, "cpu", "today", {}
    ).handover.items():
        measured = [
            (row["bytes"], row["behind_work_seconds"])
            for row in rows
            if (row["level"], row["way"]) == ("node", way)
        ]
        assert list(cost.points) == measured


def rows_of(way: str, seconds: dict[int, float], level: str = "node") -> list[dict[str, Any]]:
    return [
        {"level": level, "way": way, "bytes": n, "behind_work_seconds": t}
        for n, t in seconds.items()
    ]


def test_the_profile_knows_the_faster_way_and_channels_follow_it(
    comm: MPI.Intracomm, folder: Path
) -> None:
    rows = rows_of("shared", {1000: 1e-5, 100_000: 1e-3}) + rows_of(
        "messages", {1000: 1e-4, 100_000: 2e-4}
    )
    rows += rows_of("mpi", {1000: 1e-9}) + rows_of("messages", {1000: 1e-9}, "network")
    profile = make_profile([Section("handover", "", rows, {})], CLUSTER, 2, "cpu", "today", {})
    assert set(profile.handover) == {"shared", "messages"}
    assert [profile.faster_way(n) for n in (1000, 100_000)] == ["shared", "messages"]
    assert make_profile([], CLUSTER, 2, "cpu", "today", {}).faster_way(1000) is None
    path = folder / f"{comm.rank}.json"
    profile.save(path)
    assert load_profile(path, print, CLUSTER) == profile
    if comm.size > 1 and map_nodes(comm).on_one_node:
        channel_set = ChannelSet(
            comm, [Channel(0, 1, 1000), Channel(0, 1, 100_000)], profile=profile
        )
        assert channel_set.ways == ["shared", "messages"]
        channel_set.free()
