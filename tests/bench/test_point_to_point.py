"""Which ranks talk, and that their messages arrive; windows; what a profile keeps of it all."""

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.bench.make_profile import make_profile
from mpillm.bench.point_to_point import (
    WINDOW,
    Pair,
    fastest,
    many_pairs,
    pairs,
    ping_pong,
    stream,
    window_of,
)
from mpillm.bench.results import Section
from mpillm.machine.cluster_profile import Cluster


def test_a_pair_within_a_node_and_one_between() -> None:
    assert pairs([[0]]) == []
    assert pairs([[0, 1]]) == [Pair("node", 0, 1)]
    assert pairs([[0], [1, 2]]) == [Pair("node", 1, 2), Pair("network", 0, 1)]
    assert pairs([[0, 2], [1, 3]]) == [Pair("node", 0, 2), Pair("network", 0, 1)]


def test_halves_are_paired() -> None:
    assert many_pairs([[0]], 1) == []
    assert many_pairs([[0, 1, 2]], 3) == [Pair("node", 0, 1)]
    assert many_pairs([[0, 1], [2, 3]], 4) == [Pair("network", 0, 2), Pair("network", 1, 3)]


def test_windows_shrink_for_large_messages() -> None:
    assert [window_of(size) for size in (0, 1, 4 << 20, 64 << 20, 1 << 30)] == [
        WINDOW,
        WINDOW,
        WINDOW,
        4,
        1,
    ]


@pytest.mark.parametrize("both", [False, True])
def test_bytes_arrive(comm: MPI.Intracomm, both: bool) -> None:
    if comm.size < 2 or comm.rank > 1:
        return
    leads, peer = comm.rank == 0, 1 - comm.rank
    memory = np.full(1000, comm.rank + 1, np.uint8)
    assert ping_pong(comm, peer, leads, memory, 3) > 0
    assert (memory == 1).all()
    outgoing, incoming = np.full(1000, comm.rank + 5, np.uint8), np.zeros(1000, np.uint8)
    assert stream(comm, peer, leads, outgoing, incoming, both, 2) > 0
    assert (incoming == (peer + 5 if both or not leads else 0)).all()


CLUSTER = Cluster("Made Up 9000", 2, "Open MPI", "5.0.9", 1, 2)


def made(what: str, rows: list[dict[str, object]]) -> Section:
    return Section(what, what, rows, {})


def test_a_profile_of_what_was_measured() -> None:
    def line(algorithm: str, rate: float) -> list[dict[str, object]]:
        facts = {
            "operation": "allreduce",
            "algorithm": algorithm,
            "chosen": "copy",
            "element": "float32",
        }
        facts |= {"node_shared": algorithm == "shared"}
        return [
            facts | {"bytes": size, "median_seconds": 1e-6 + size / rate} for size in (4096, 1024)
        ]

    names = {
        "auto": 1e9,
        "ring": 1e9,
        "shared": 2e9,
        "shared, private": 1e9,
        "gloo": 1e9,
        "floor": 4e9,
    }
    message = {"level": "node", "bytes": 64, "median_seconds": 1e-6}
    found = make_profile(
        [
            made("allreduce", [row for name, rate in names.items() for row in line(name, rate)]),
            made("latency", [message]),
            made("bibw", [message | {"bytes_per_second": rate} for rate in (3.0, 5.0)]),
            made("message-rate", [message | {"messages_per_second": 7.0}]),
            made(
                "memory",
                [{"kernel": "copy", "bytes": 64, "median_seconds": 1e-8, "bytes_per_second": 1e10}],
            ),
            made("gemm", [{"element": "float32", "edge": 64, "flops_per_second": 1e9}]),
            made("filesystem", [{"path": "read windows, cold", "all_bytes_per_second": 2.0}]),
        ],
        CLUSTER,
        2,
        "cpu",
        "today",
        {},
    )
    assert [(entry.algorithm, entry.node_shared) for entry in found.collectives] == [
        ("ring", False),
        ("shared", True),
        ("shared", False),
    ]
    cost = found.collectives[0].cost
    assert [size for size, _ in cost.points] == [1024, 4096]
    assert cost.bytes_per_second == pytest.approx(1e9)
    assert found.predict("allreduce", "ring", 1024, "float32", 1, 2) == pytest.approx(2.024e-6)
    level = found.point_to_point[0]
    assert (level.bandwidth_bytes_per_second, level.both_ways_bytes_per_second) == (None, 5.0)
    assert level.messages_per_second == 7
    assert [size for size, _ in found.memory["floor"]] == [64, 1024, 4096]
    assert found.memory["copy_bytes_per_second"] == 1e10
    assert found.gemm[0]["edge"] == 64
    assert found.filesystem == {"read_windows_cold_bytes_per_second": 2.0}
    empty = make_profile([], CLUSTER, 2, "cpu", "today", {})
    assert (empty.collectives, empty.point_to_point, dict(empty.memory)) == ((), (), {})


def test_the_fastest_of_a_level() -> None:
    rows = [
        {"level": "node", "bytes_per_second": 1.0},
        {"level": "network", "bytes_per_second": 9.0},
    ]
    assert fastest("bandwidth", rows, "node") == 1
    assert fastest("bandwidth", rows, "elsewhere") is None
