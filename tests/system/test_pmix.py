"""Ranks wait for each other before their first message; test_slurm.py has it between nodes."""

from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.system.pmix import wait_until_all_began

LATE_RANK = Path(__file__).parents[1] / "fixtures" / "late_rank.py"


@pytest.mark.usefixtures("processes")
@pytest.mark.skipif(
    MPI.get_vendor()[0] != "Open MPI", reason="only Open MPI's ranks are started by PMIx"
)
def test_no_rank_speaks_before_all_are_there(python, tmp_path):
    done = python(LATE_RANK, tmp_path / "late", ranks=3)
    assert done.returncode == 0, done.stderr


def test_ranks_may_meet_at_any_time(comm):
    for _ in range(3):
        wait_until_all_began(comm.size)
    comm.Barrier()
