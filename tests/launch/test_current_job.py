from pathlib import Path

import pytest

from mpillm.errors import UsageError
from mpillm.launch.current_job import CurrentJob, current_job, foreign_job, job_end


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "12"}, CurrentJob("slurm", "12", 0)),
        ({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3"}, CurrentJob("slurm", "12", 3)),
        ({"PBS_JOBID": "7.head", "MPILLM_JOB_RESTART": "2"}, CurrentJob("pbs", "7.head", 2)),
        ({"LSB_JOBID": "5", "MPILLM_JOB_RESTART": "x"}, CurrentJob("lsf", "5", 0)),
        ({"FLUX_JOB_ID": "f2A", "SLURM_JOB_ID": "12"}, CurrentJob("slurm", "12", 0)),
        ({"SLURM_JOB_ID": "", "FLUX_JOB_ID": "f2A"}, CurrentJob("flux", "f2A", 0)),
    ],
)
def test_the_job_around_a_process(environment: dict[str, str], job: CurrentJob | None) -> None:
    assert current_job(environment) == job


def test_the_end_of_the_job() -> None:
    assert job_end({}) is None
    assert job_end({"SLURM_JOB_END_TIME": "1700000000"}) == 1_700_000_000
    assert (
        job_end({"SLURM_JOB_END_TIME": "1700000000", "MPILLM_JOB_END": "1600000000.5"})
        == 1_600_000_000.5
    )
    assert job_end({"SLURM_JOB_END_TIME": "Unknown"}) is None


def test_an_end_that_is_no_number() -> None:
    with pytest.raises(UsageError, match="unix seconds"):
        job_end({"MPILLM_JOB_END": "soon"})


@pytest.mark.parametrize("setting", ["nan", "inf", "-inf", "1e300", "-5", "²", "1 2", "0x10"])
def test_an_end_that_is_no_time_names_its_variable(setting: str) -> None:
    with pytest.raises(UsageError, match="MPILLM_JOB_END is the end of the job in unix seconds"):
        job_end({"MPILLM_JOB_END": setting}, 1e9)


def test_an_end_that_was_past_at_the_start_is_of_an_earlier_job() -> None:
    said: list[str] = []
    old, later = "1700000000", "2000000000"
    for variable in ("SLURM_JOB_END_TIME", "MPILLM_JOB_END"):
        assert job_end({variable: old}, 1_800_000_000, said.append) is None
        assert said[-1].startswith(f"{variable}={old} is over since 2023-11-1")
        assert said[-1].endswith(f"unset {variable}")
    # The next variable may be of this job.
    both = {"MPILLM_JOB_END": old, "SLURM_JOB_END_TIME": later}
    assert job_end(both, 1_800_000_000, said.append) == float(later)
    assert len(said) == 3
    assert job_end({"SLURM_JOB_END_TIME": "9" * 30}, 1_800_000_000, said.append) is None
    assert len(said) == 3


def test_variables_of_a_job_on_other_hosts_are_said(tmp_path: Path) -> None:
    slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1,n2.cluster", "PATH": ""}
    assert foreign_job(slurm, "n2") == foreign_job(slurm, "n1.cluster") == ""
    assert foreign_job(slurm, "n3") == (
        "SLURM_JOB_ID=12 is of a job on n1, n2.cluster, and this host is n3; "
        "if that job is over, unset SLURM_JOB_ID"
    )
    # Not known without scontrol, which expands the list.
    assert foreign_job(slurm | {"SLURM_JOB_NODELIST": "n[1-2]"}, "n3") == ""
    assert foreign_job({}, "n3") == ""
    (tmp_path / "hosts").write_bytes(b"n1 slots=2\ncaf\xe9\n")
    pbs = {"PBS_JOBID": "7", "PBS_NODEFILE": str(tmp_path / "hosts")}
    assert "is of a job on n1, caf" in foreign_job(pbs, "n3")
