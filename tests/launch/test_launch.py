import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpillm.launch.launchers import rank_from_environment, watched
from mpillm.launch.threads import fair_threads, threads_per_rank
from mpillm.system.versions import versions


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"OMPI_COMM_WORLD_RANK": "3"}, 3),
        ({"PMI_RANK": "2"}, 2),
        ({"SLURM_PROCID": "x"}, 0),
    ],
)
def test_the_rank_that_the_launcher_tells(environment: dict[str, str], rank: int) -> None:
    assert rank_from_environment(environment) == rank


@pytest.mark.parametrize(
    ("masks", "threads"),
    [
        ([{0, 1, 2, 3}], [4]),
        ([{0, 1, 2, 3}] * 2, [2, 2]),
        ([{0, 1}, {2, 3}], [2, 2]),
        ([{0, 1}] * 4, [1, 1, 1, 1]),
        ([{0, 1, 2}, {2, 3}], [2, 1]),
        ([set(range(10))] * 3, [3, 3, 3]),
    ],
)
def test_cores_are_shared_fairly(masks: list[set[int]], threads: list[int]) -> None:
    assert [fair_threads(masks, rank) for rank in range(len(masks))] == threads


def test_the_users_wish_for_threads_is_followed(comm) -> None:  # type: ignore[no-untyped-def]
    assert threads_per_rank(comm, {"OMP_NUM_THREADS": "7"}) == 7
    assert threads_per_rank(comm, {"OMP_NUM_THREADS": "3,2"}) == 3
    assert 1 <= threads_per_rank(comm, {}) <= (os.cpu_count() or 1)


def test_versions_name_every_part() -> None:
    found = versions()
    assert {"mpillm", "MPI", "mpi4py", "torch", "h5py"} <= set(found)
    assert found["MPI"]
    assert found["torch"][0].isdigit()


@pytest.mark.usefixtures("processes")
def test_a_pipe_is_not_watched(folder: Path) -> None:
    code = "import os; from mpillm.launch.launchers import watched; print(watched(os.environ))"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.usefixtures("processes")
def test_a_pseudo_terminal_under_mpirun_is_not_watched_when_mpirun_writes_to_a_pipe(
    python, folder: Path
) -> None:  # type: ignore[no-untyped-def]
    script = folder / "watched.py"
    script.write_text(
        "import os; from mpillm.launch.launchers import watched\n"
        "print('watched ' + str(watched(os.environ)) + chr(10), end='', flush=True)"
    )
    done = python(script, ranks=2)
    assert done.stdout.count("watched False") == 2, done.stdout + done.stderr


def test_outside_a_terminal_nobody_watches() -> None:
    if not os.isatty(1):
        assert watched({}) is False
