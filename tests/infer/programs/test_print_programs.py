"""`mpillm programs`: files of problems and samples, pass@k, and nothing run unless allowed."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.errors import DataError, UsageError
from mpillm.infer.programs.print_programs import ProgramOptions, print_programs
from mpillm.infer.programs.problem_files import read_problem_set
from mpillm.infer.programs.run_programs import ProgramLimits, joined_program, passes
from mpillm.system.console import Console

TEST = "def check(f):\n    assert f(2, 3) == 5\n"
ADD = {"task_id": "add", "prompt": "def add(a, b):\n", "test": TEST, "entry_point": "add"}
SUM = {"task_id": "sum", "prompt": "def total(a, b):\n", "test": TEST, "entry_point": "total"}
RIGHT, WRONG = "    return a + b\n", "    return a - b\n"


def sample(name: str, completion: str) -> dict[str, str]:
    return {"task_id": name, "completion": completion}


SAMPLES = [sample("sum", WRONG), sample("add", RIGHT), sample("add", WRONG), sample("sum", WRONG)]


def write(folder: Path, problems: list[Any], samples: list[Any]) -> tuple[Path, Path]:
    paths = folder / "problems.jsonl", folder / "samples.jsonl"
    for path, rows in zip(paths, (problems, samples), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def test_samples_are_joined_with_their_problem(tmp_path: Path) -> None:
    found = read_problem_set(*write(tmp_path, [ADD, SUM], SAMPLES))
    assert found.names == ("add", "sum")
    assert found.programs[0] == tuple(
        joined_program(ADD["prompt"], each, TEST, "add") for each in (RIGHT, WRONG)
    )
    assert len(found.programs[1]) == 2


@pytest.mark.parametrize(
    ("problems", "samples", "message"),
    [
        ([ADD, ADD], SAMPLES, "line 2: the task_id 'add' is there twice"),
        ([ADD], SAMPLES, r"samples\.jsonl, line 1: the task_id 'sum' is not in .*, which has add"),
        ([ADD, SUM], SAMPLES[1:3], "has no sample of sum \\(1 of 2 problems"),
        ([{**ADD, "entry_point": "add)"}], SAMPLES, "the entry_point .* is no name of a function"),
        ([{"task_id": "add"}], SAMPLES, "line 1: it has no text 'prompt', but task_id"),
        ([ADD], [{"task_id": "add", "completion": None}], "line 1: it has no text 'completion'"),
        ([], SAMPLES, "has no problem"),
    ],
)
def test_faults_are_named_with_their_place(
    tmp_path: Path, problems: list[Any], samples: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_problem_set(*write(tmp_path, problems, samples))


def test_nothing_runs_unless_allowed(
    folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "mpillm.infer.programs.run_programs.passes"
    monkeypatch.setattr(module, lambda *_: pytest.fail("a program was run"))
    if comm.rank == 0:
        write(folder, [ADD, SUM], SAMPLES)
    comm.Barrier()
    paths = folder / "problems.jsonl", folder / "samples.jsonl"
    quiet = Console(speaks=False)
    with pytest.raises(
        UsageError, match=r"4 programs that a model wrote.* allow it with --run-pro"
    ):
        print_programs(*paths, ProgramOptions(allowed=False), comm, quiet)
    with pytest.raises(UsageError, match="the metric bleu reads texts"):
        print_programs(*paths, ProgramOptions(True, ["bleu"]), comm, quiet)


def test_pass_at_k_is_printed(folder: Path, comm: MPI.Intracomm) -> None:
    try:
        passes("pass")
    except UsageError:
        pytest.skip("needs user namespaces with mounts")
    if comm.rank == 0:
        write(folder, [ADD, SUM], SAMPLES)
    comm.Barrier()
    stream = io.StringIO()
    console = Console(speaks=comm.rank == 0, stream=stream)
    paths = folder / "problems.jsonl", folder / "samples.jsonl"
    limits = ProgramLimits(seconds=1)
    print_programs(*paths, ProgramOptions(True, (), limits, as_json=True), comm, console)
    if comm.rank == 0:
        found = json.loads(stream.getvalue())
        # Two samples of a problem are too few for pass@10.
        assert found["values"] == {"pass@1": 0.25}
        assert (found["problems"], found["programs"]) == (2, 4)
    with pytest.raises(UsageError, match="pass@10 needs 10 samples"):
        print_programs(*paths, ProgramOptions(True, ["pass@10"], limits), comm, console)
