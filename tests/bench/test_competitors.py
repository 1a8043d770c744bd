"""Who is measured: names that exist, peers that fit, arrays that lie where they should, wrong
results that are seen.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.bench import peers
from mpillm.bench.bench_options import BenchOptions
from mpillm.bench.competitors import (
    ArrayMemory,
    Competitor,
    competitors,
    peers_wanted,
    runnable,
    select,
    tried,
)
from mpillm.bench.pattern import count_wrong
from mpillm.bench.peers import joined
from mpillm.bench.sample_arrays import Shape
from mpillm.comm.communicator import Communicator
from mpillm.errors import CommError, UsageError
from mpillm.machine.node_map import map_nodes

HERE = ("auto", "ring", "mpi", "reference")


def test_names() -> None:
    notes: list[str] = []
    assert select((), HERE, notes.append, "allreduce") == ["auto", "ring", "mpi"]
    assert select(("reference", "gloo", "auto"), HERE, notes.append, "allreduce") == [
        "reference",
        "auto",
    ]
    assert select(("gloo",), HERE, notes.append, "allreduce") == []
    assert notes == []
    assert select(("pairwise", "ring"), HERE, notes.append, "allreduce") == ["ring"]
    assert notes == ["allreduce has no pairwise on this job"]
    with pytest.raises(
        UsageError, match=r"'rign' is unknown; .*auto, ring, mpi, reference, gloo, torch-nccl"
    ):
        select(("ring", "rign"), HERE, notes.append, "allreduce")


def test_peers() -> None:
    assert peers_wanted(BenchOptions("all")) == ("gloo",)
    assert peers_wanted(BenchOptions("all", device="cuda")) == ("gloo", "torch-nccl")
    assert peers_wanted(BenchOptions("all", algorithms="ring")) == ()
    assert peers_wanted(BenchOptions("all", algorithms="torch-nccl, ring")) == ("torch-nccl",)


@pytest.mark.parametrize("one_node", [True, False])
def test_peers_without_a_place_to_meet(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, one_node: bool
) -> None:
    """What rank 0 cannot make, no rank waits for."""
    pytest.importorskip("torch")

    def fail(**given: str) -> str:
        raise OSError(28, "No space left on device", "/tmp/x")

    monkeypatch.setattr(peers.tempfile, "mkdtemp", fail)
    monkeypatch.setattr(peers, "_free_port", fail)
    notes: list[str] = []
    with joined(comm, ("gloo",), notes.append, one_node) as found:
        assert found == {}
    [note] = notes
    assert note.startswith("left out: gloo: /tmp/x: No space left on device")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"what": "allreduc"}, "did you mean allreduce"),
        ({"dtype": "bfloat"}, "did you mean bfloat16"),
        ({"device": "tpu"}, "--device 'tpu'"),
        ({"buffers": "cold"}, "--buffers 'cold'"),
        ({"op": "avg"}, "--op 'avg'"),
        ({"sizes": "many"}, "not a size"),
        ({"iterations": 0}, "--iterations is 1 or more"),
        ({"warmup": -1}, "--warmup 0 or more"),
        ({"what": "gemm", "sizes": "1G"}, "edges of square matrices"),
        ({"as_json": True, "csv": Path("-")}, "standard output"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        BenchOptions(**{"what": "all"} | settings)


@pytest.fixture
def group(comm: MPI.Intracomm) -> Any:
    made = Communicator(comm)
    yield made
    made.free()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "operation", ["allreduce", "reduce_scatter", "allgather", "broadcast", "reduce", "alltoall"]
)
def test_everyone_is_right(
    comm: MPI.Intracomm, group: Communicator, operation: str, in_place: bool
) -> None:
    shape = Shape(operation, 60 * comm.size, "float32", comm.size, comm.rank, in_place)
    notes: list[str] = []
    memory = ArrayMemory(group, shape, BenchOptions("all", in_place=in_place))
    with joined(comm, ("gloo",), notes.append, map_nodes(comm).on_one_node) as peers:
        names = list(runnable(group, operation, BenchOptions("all")))
        for name, entry in competitors(group, peers, memory, names, BenchOptions("all")).items():
            chosen, reason = tried(group, entry)
            assert not reason or name == "gloo", reason
            if reason:
                continue
            assert chosen == name.partition(",")[0] or name == "auto"
            result, _ = entry.try_out()
            assert count_wrong(operation, result, shape.bounds, comm.rank, "float32", "sum", 0) == 0
    memory.free()


def test_a_wrong_result_is_counted(comm: MPI.Intracomm, group: Communicator) -> None:
    shape = Shape("allreduce", 100, "bfloat16", comm.size, comm.rank, True)
    memory = ArrayMemory(group, shape, BenchOptions("all", in_place=True))

    def spoilt(source: Any, target: Any) -> Any:
        prepared = group.prepare("allreduce", source)

        def run() -> None:
            prepared.run()
            source[50 + comm.rank] += 1

        return run, prepared.algorithm

    result, _ = Competitor("auto", memory, spoilt).try_out()
    assert count_wrong("allreduce", result, shape.bounds, comm.rank, "bfloat16", "sum", 0) == 1
    memory.free()


def test_what_one_rank_cannot_do_no_rank_does(comm: MPI.Intracomm, group: Communicator) -> None:
    shape = Shape("allreduce", 10, "float32", comm.size, comm.rank, True)
    memory = ArrayMemory(group, shape, BenchOptions("all", in_place=True))

    def refused(source: Any, target: Any) -> Any:
        if comm.rank == comm.size - 1:
            raise CommError("not here\nand not there")
        return (lambda: None), "none"

    assert tried(group, Competitor("none", memory, refused))[1] == "not here"
    memory.free()


def test_arrays_are_kept_or_new(comm: MPI.Intracomm, group: Communicator) -> None:
    shape, options = (
        Shape("allreduce", 1000, "float32", comm.size, comm.rank, False),
        BenchOptions("all"),
    )
    warm = ArrayMemory(group, shape, options)
    assert warm.pair("mpi")[0] is warm.pair("ring")[0]
    assert warm.is_shared("auto") == (group.size > 1 and "shared" in group.algorithms("allreduce"))
    assert not warm.is_shared("mpi")
    assert np.shares_memory(warm.pair("auto")[0], warm.pair("mpi")[0]) == (
        not warm.is_shared("auto")
    )
    fresh = ArrayMemory(group, shape, replace(options, buffers="fresh", node_shared=False))
    assert fresh.pair("auto")[0] is not fresh.pair("auto")[0]
    assert not fresh.is_shared("auto")
    for memory in (warm, fresh):
        memory.free()
