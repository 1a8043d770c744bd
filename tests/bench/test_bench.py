"""`mpillm bench` as a user starts it: tiny sizes, never a word about how fast it was."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("processes")
FEW = ("--iterations", "2", "--warmup", "1")


def result(done: Any) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_all_of_it_at_two_ranks(mpillm, folder: Path) -> None:  # type: ignore[no-untyped-def]
    plot, saved, table = (folder / name for name in ("bench.png", "profile.json", "bench.csv"))
    value = result(
        mpillm(
            "bench",
            "all",
            "--sizes",
            "1K,20K",
            "--check",
            "--json",
            "--plot",
            plot,
            "--save",
            saved,
            "--csv",
            table,
            "--folder",
            folder,
            *FEW,
            ranks=2,
        )
    )
    found = {part["benchmark"]: part["rows"] for part in value["results"]}
    expected = {
        "allreduce",
        "reduce-scatter",
        "allgather",
        "broadcast",
        "reduce",
        "alltoall",
        "barrier",
        "overlap",
        "memory",
        "gemm",
        "filesystem",
        "latency",
        "bandwidth",
        "bibw",
        "message-rate",
        "handover",
    }
    assert set(found) == expected
    for what in ("allreduce", "reduce-scatter", "allgather", "broadcast", "reduce", "alltoall"):
        rows = [row for row in found[what] if row["algorithm"] != "floor"]
        assert {row["algorithm"] for row in rows} >= {"auto", "mpi"}
        assert [row["wrong"] for row in rows] == [0] * len(rows), what
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(list(csv.DictReader(table.open()))) == sum(map(len, found.values()))
    profile = json.loads(saved.read_text())
    assert profile["schema"] == "mpillm cluster profile"
    assert profile["collectives"][0]["ranks"] == 2
    assert set(folder.iterdir()) == {plot, saved, table}
    again = mpillm("bench", "allreduce", "--sizes", "1K", "--profile", saved, *FEW, ranks=2)
    assert again.returncode == 0, again.stderr
    assert "warning" not in again.stdout
    saved.write_text(json.dumps(profile | {"version": 0}))
    warned = mpillm("bench", "barrier", "--profile", saved, *FEW)
    assert warned.stdout.count("warning:") == 1


def test_a_table_for_people_and_lines_for_programs(mpillm) -> None:  # type: ignore[no-untyped-def]
    told = mpillm(
        "bench", "allreduce", "--sizes", "1K", "--algorithms", "auto,mpi,nccl", *FEW, ranks=2
    )
    assert told.returncode == 0, told.stderr
    for word in ("MPI library", "binding", "algbw", "busbw", "#wrong", "× mpi", "nccl"):
        assert word in told.stdout
    lines = mpillm("bench", "gemm", "--sizes", "16", "--csv", "-", *FEW)
    assert [row["edge"] for row in csv.DictReader(io.StringIO(lines.stdout))] == ["16", "16"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("allreduc",), "did you mean allreduce"),
        (("allreduce", "--algorithms", "native,rign"), "'rign' is unknown"),
        (("allreduce", "--sizes", "1K:oops"), "'oops' is not a size"),
        (("filesystem", "--folder", "{}/none"), "existing folder"),
    ],
)
def test_a_mistake_ends_in_one_message(
    mpillm, folder: Path, arguments: tuple[str, ...], words: str
) -> None:  # type: ignore[no-untyped-def]
    done = mpillm("bench", *(argument.format(folder) for argument in arguments))
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert list(folder.iterdir()) == []
