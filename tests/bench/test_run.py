"""Whole benchmarks in the suite's own ranks: nothing is wrong whatever the arrays, and what cannot
be is refused.
"""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.bench.bench_options import COLLECTIVES, BenchOptions
from mpillm.bench.collectives import run_collective
from mpillm.bench.context import BenchContext
from mpillm.bench.overlap import run_overlap, work
from mpillm.bench.run import run_benchmarks
from mpillm.comm.communicator import Communicator
from mpillm.errors import UsageError
from mpillm.system.console import Console

QUICK = BenchOptions("all", sizes="100,5K", iterations=2, warmup=1, check=True)


def measured(comm: MPI.Intracomm, what: str, options: BenchOptions) -> list[dict[str, Any]]:
    """Measure a collective; check that the ranks agree, and give all rows but the floor's."""
    group = Communicator(comm)
    bench = BenchContext(options, comm, group, Console(speaks=False))
    rows = run_collective(bench, what)[0].rows
    group.free()
    assert comm.allgather((rows, bench.notes)) == [(rows, bench.notes)] * comm.size
    return [row for row in rows if row["algorithm"] != "floor"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"in_place": True},
        {"buffers": "fresh"},
        {"buffers": "fresh", "in_place": True},
        {"node_shared": False},
        {"node_shared": True, "in_place": True},
        {"op": "max"},
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_nothing_is_wrong_in_any_memory(
    comm: MPI.Intracomm, dtype: str, settings: dict[str, Any]
) -> None:
    rows = measured(comm, "allreduce", replace(QUICK, dtype=dtype, **settings))
    assert {row["algorithm"] for row in rows} >= {"auto", "mpi", "ring"}
    assert {row["wrong"] for row in rows} == {0}


@pytest.mark.parametrize("what", list(COLLECTIVES))
def test_every_collective(comm: MPI.Intracomm, what: str) -> None:
    for settings in ({}, {"op": "mean"}):
        rows = measured(comm, what, replace(QUICK, **settings))
        assert {row["algorithm"] for row in rows} >= {"auto", "mpi"}
        assert {row["wrong"] for row in rows} == {0}
        assert all(
            row["min_seconds"] <= row["median_seconds"] <= row["max_seconds"] for row in rows
        )


def test_overlap_is_a_share(comm: MPI.Intracomm) -> None:
    group = Communicator(comm)
    options = replace(QUICK, what="overlap", algorithms="auto,mpi,ring")
    rows = run_overlap(BenchContext(options, comm, group, Console(speaks=False)))[0].rows
    group.free()
    assert {row["algorithm"] for row in rows} == {"auto", "mpi", "ring"}
    assert all(0 <= row[f"{way}_overlap"] <= 1 for row in rows for way in ("polled", "unpolled"))


@pytest.mark.parametrize(("units", "each"), [(1, 1), (40, 1), (79, 2), (1000, 25)])
def test_work_is_polled_between_slices(units: int, each: int) -> None:
    done: list[str] = []
    work(lambda: done.append("unit"), units, lambda: done.append("poll"))
    assert done.index("poll") == each
    assert done.count("unit") in range(units - each + 1, units + 1)
    assert done[-1] == "poll"


@pytest.mark.parametrize(
    "what", ["latency", "bandwidth", "bibw", "message-rate", "memory", "gemm", "filesystem"]
)
def test_the_others(comm: MPI.Intracomm, folder: Path, what: str) -> None:
    out = io.StringIO()
    options = BenchOptions(
        what, sizes="16,128", iterations=2, warmup=1, as_json=True, folder=folder
    )
    run_benchmarks(options, comm, Console(speaks=comm.rank == 0, stream=out))
    if comm.rank == 0:
        value = json.loads(out.getvalue())
        alone = comm.size == 1 and what in ("latency", "bandwidth", "bibw", "message-rate")
        assert len(value["results"]) == (0 if alone else 1)
        assert ("mpirun -n 2" in " ".join(value["notes"])) == alone
        assert all(row["median_seconds"] > 0 for part in value["results"] for row in part["rows"])
        assert list(folder.iterdir()) == []
    comm.Barrier()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"what": "filesystem"}, "--folder DIR"),
        ({"what": "filesystem", "folder": Path("/proc/none")}, "existing folder"),
        ({"profile": Path("/proc/none.json")}, "there is no profile"),
        ({"plot": Path("/proc/none/a.png")}, "/proc/none"),
        ({"save": Path("/proc")}, "is a folder"),
        ({"what": "gemm", "dtype": "int8"}, "floats"),
        ({"algorithms": "rign"}, "'rign' is unknown"),
    ],
)
def test_what_cannot_be(comm: MPI.Intracomm, settings: dict[str, Any], words: str) -> None:
    options = BenchOptions(**{"what": "allreduce", "sizes": "1K"} | settings)
    with pytest.raises(UsageError, match=words):
        run_benchmarks(options, comm, Console(speaks=False))
