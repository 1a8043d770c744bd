"""Launchers, by the variables that real ones left to rank 1 of 2 (see launchers.py)."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.errors import LaunchError
from mpillm.launch.launchers import (
    LAUNCHERS,
    RANK_VARIABLES,
    Started,
    detect,
    is_one_of_several,
    launcher_named,
    rank_from_environment,
)
from mpillm.launch.singleton import (
    LonelyError,
    one_voice,
    refuse_before_init,
    refuse_lonely_ranks,
)
from mpillm.machine.mpi_names import mpirun_of, named

OPEN_MPI = (
    "Open MPI v5.0.11, package: Open MPI user@localhost Distribution, "
    "ident: 5.0.11, Sep 16, 2026\x00"
)
MPICH = (
    "MPICH Version:      5.0.2\nMPICH Release date: Fri Sep 25\n"
    "MPICH configure:    --with-device=ch4:ucx,ofi\n"
)
INTEL = "Intel(R) MPI Library 2021.18.1 for Linux* OS\n"

OMPI_5 = {
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_UNIVERSE_SIZE": "2",
    "OMPI_VERSION": "5.0.11",
    "PMIX_NAMESPACE": "prterun-vm-7746@1",
    "PMIX_RANK": "1",
    "PMIX_VERSION": "5.0.11rc1",
    "PRTE_LAUNCHED": "1",
}
HYDRA = {
    "GFORTRAN_UNBUFFERED_PRECONNECTED": "y",
    "HYDI_CONTROL_FD": "7",
    "MPI_LOCALNRANKS": "2",
    "MPI_LOCALRANKID": "1",
    "PMI_FD": "9",
    "PMI_HOSTNAME": "vm",
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
}
INTEL_HYDRA = {
    "HYDRA_BSTRAP_LAUNCHER": "ssh",
    "I_MPI_HYDRA_UUID": "e4210000-10f2-0430-2e61-0600e8048003",
    "I_MPI_MPIRUN": "mpirun",
    "MPI_LOCALNRANKS": "2",
    "MPI_LOCALRANKID": "1",
    "PMI_FD": "11",
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
}
# Slurm 22.05, in one environment each: the shell of `sbatch -n 4`, and a step of `srun -n 2`.
SBATCH = {
    "SLURM_CPUS_ON_NODE": "4",
    "SLURM_JOB_CPUS_PER_NODE": "4",
    "SLURM_JOB_ID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NPROCS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "4",
}
SRUN = {
    "SLURM_CPUS_ON_NODE": "2",
    "SLURM_JOB_ID": "2",
    "SLURM_LOCALID": "1",
    "SLURM_NPROCS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}
SRUN_PMI2 = SRUN | {
    "PMI_FD": "13",
    "PMI_JOBID": "3.0",
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "SLURM_MPI_TYPE": "pmi2",
}
SRUN_PMIX = SRUN | {"PMIX_NAMESPACE": "slurm.pmix.4.0", "PMIX_RANK": "1", "SLURM_MPI_TYPE": "pmix"}
SRUN_CRAY = SRUN | {
    "PALS_APID": "5.0",
    "PALS_NODEID": "0",
    "PALS_RANKID": "1",
    "SLURM_MPI_TYPE": "cray_shasta",
}
# mpirun inside an allocation of 4: Hydra's daemon is a step of one task, whose variables remain.
HYDRA_IN_SLURM = (
    SBATCH | HYDRA | {"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
)
# From documents, not from a run.
PALS = {
    "PALS_RANKID": "1",
    "PALS_LOCAL_RANKID": "1",
    "PALS_NODEID": "0",
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
}
JSRUN = {
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_RANK": "1",
    "JSM_NAMESPACE_SIZE": "2",
    "PMIX_RANK": "1",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
}
FLUX = {
    "FLUX_TASK_RANK": "1",
    "FLUX_TASK_LOCAL_ID": "1",
    "FLUX_JOB_SIZE": "2",
    "FLUX_JOB_NNODES": "1",
    "PMI_FD": "20",
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
}
MVAPICH2 = {
    "MV2_COMM_WORLD_RANK": "1",
    "MV2_COMM_WORLD_SIZE": "2",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "PMI_ID": "1",
}


@pytest.mark.parametrize(
    ("environment", "name", "details"),
    [
        (OMPI_5, "mpirun (Open MPI)", {"version": "5.0.11"}),
        (SBATCH | OMPI_5, "mpirun (Open MPI)", {"version": "5.0.11"}),
        (HYDRA, "mpirun (MPICH's Hydra)", {}),
        (HYDRA_IN_SLURM, "mpirun (MPICH's Hydra)", {}),
        (INTEL_HYDRA, "mpirun (Intel MPI's Hydra)", {}),
        (HYDRA_IN_SLURM | INTEL_HYDRA, "mpirun (Intel MPI's Hydra)", {}),
        (SRUN, "srun", {"mpi": "none"}),
        (SRUN | {"SLURM_MPI_TYPE": "pmix"}, "srun", {"mpi": "none"}),
        (SRUN_PMI2, "srun", {"mpi": "pmi2"}),
        (SRUN_PMIX, "srun", {"mpi": "pmix"}),
        (SRUN_CRAY, "srun", {"mpi": "cray_shasta"}),
        (PALS, "mpiexec (Cray PALS)", {}),
        (JSRUN, "jsrun", {}),
        (FLUX, "flux run", {}),
        (MVAPICH2, "mpirun (MVAPICH2)", {}),
    ],
)
def test_each_launcher_is_known_by_what_it_leaves(
    environment: dict[str, str], name: str, details: dict[str, str]
) -> None:
    assert detect(environment) == Started(name, 1, 2, 1, details)
    assert rank_from_environment(environment) == 1


def test_a_bare_rank_is_taken_from_any_process_manager() -> None:
    assert detect({"PMI_RANK": "2", "PMI_SIZE": "3"}) == Started("a PMI launcher", 2, 3)
    assert detect({"PMIX_RANK": "2"}) == Started("a PMIx launcher", 2)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HOME": "/"},
        SBATCH,
        {"PMI_RANK": ""},
        {"PMI_RANK": "-1"},
        {"OMPI_COMM_WORLD_RANK": "²"},
    ],
)
def test_a_shell_or_a_wrong_number_is_no_rank(environment: dict[str, str]) -> None:
    assert detect(environment) == Started()
    refuse_lonely_ranks(environment, 1, OPEN_MPI)


def test_a_rank_that_was_left_in_the_environment_silences_nobody() -> None:
    assert is_one_of_several(OMPI_5)
    assert is_one_of_several({"PMI_RANK": "2", "PMI_SIZE": "3"})
    for environment in (
        {},
        {"PMI_RANK": "1"},
        {"PMIX_RANK": "7"},
        {"PMI_RANK": "1", "PMI_SIZE": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "3"},
        SBATCH,
    ):
        assert not is_one_of_several(environment)


@pytest.mark.usefixtures("processes")
def test_verbs_of_one_process_print_under_a_rank_that_was_left(mpillm: Any, folder: Path) -> None:
    done = mpillm("status", folder / "none", PMI_RANK="1")
    assert (done.returncode, "there is no folder" in done.stderr) == (2, True)
    alone = mpillm("--version", PMI_RANK="1")
    assert alone.stdout.startswith("mpillm ")


def test_the_table_is_whole() -> None:
    assert len({launcher.name for launcher in LAUNCHERS}) == len(LAUNCHERS)
    assert all(launcher_named(launcher.name) is launcher for launcher in LAUNCHERS)
    assert launcher_named("") is None
    assert {launcher.rank for launcher in LAUNCHERS} == set(RANK_VARIABLES)


@pytest.mark.parametrize(
    ("environment", "library", "words"),
    [
        (
            HYDRA,
            OPEN_MPI,
            [
                "mpirun (MPICH's Hydra) started 2 processes",
                "Open MPI 5.0.11",
                "the mpirun of Open MPI",
            ],
        ),
        (
            OMPI_5,
            INTEL,
            [
                "mpirun (Open MPI 5.0.11) started 2",
                "Intel MPI 2021.18.1",
                "the mpirun of Intel MPI",
            ],
        ),
        (SRUN, OPEN_MPI, ["srun --mpi=none started 2", "srun --mpi=pmix (srun --mpi=list"]),
        (SRUN_PMI2, OPEN_MPI, ["srun --mpi=pmi2 started 2", "srun --mpi=pmix (srun --mpi=list"]),
        (SRUN, MPICH, ["MPICH 5.0.2", "srun --mpi=pmi2 (srun --mpi=list"]),
        (SRUN, INTEL, ["srun --mpi=pmi2 and I_MPI_PMI_LIBRARY set"]),
        (
            SRUN,
            "MPI VERSION    : CRAY MPICH version 8.1.30.8 (ANL base 3.4a2)",
            ["Cray MPICH 8.1.30.8", "cray_shasta"],
        ),
        (SRUN_PMIX, OPEN_MPI, ["mpirun inside the allocation", "does not understand Slurm's pmix"]),
        (FLUX, OPEN_MPI, ["flux run started 2", "-o pmi=pmix"]),
        (JSRUN, OPEN_MPI, ["jsrun started 2", "build mpi4py"]),
        (PALS, OPEN_MPI, ["mpiexec (Cray PALS) started 2", "build mpi4py"]),
        (
            {"PMI_RANK": "0", "PMI_SIZE": "8"},
            "Some MPI 1.0\nmore",
            ["a PMI launcher started 8", "Some MPI 1.0, in"],
        ),
    ],
)
def test_lonely_ranks_are_refused_with_the_cure(
    environment: dict[str, str], library: str, words: list[str]
) -> None:
    with pytest.raises(LonelyError) as caught:
        refuse_lonely_ranks(environment, 1, library)
    for word in (*words, "each is alone", "MPILLM_ALONE=1"):
        assert word in str(caught.value)
    refuse_lonely_ranks(environment, 2, library)
    refuse_lonely_ranks(environment | {"MPILLM_ALONE": "1"}, 1, library)
    with pytest.raises(LonelyError):
        refuse_lonely_ranks(environment | {"MPILLM_ALONE": "0"}, 1, library)


def test_a_lone_process_under_a_launcher_may_go_on() -> None:
    refuse_lonely_ranks(
        OMPI_5 | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, 1, OPEN_MPI
    )
    refuse_lonely_ranks({"PMIX_RANK": "0"}, 1, OPEN_MPI)


def test_mpich_without_pmix_is_stopped_before_it_aborts() -> None:
    with pytest.raises(
        LonelyError, match=r"mpirun \(Open MPI 5.0.11\) started 2 processes by PMIx.*MPICH 5.0.2"
    ):
        refuse_before_init(OMPI_5, MPICH)
    with pytest.raises(
        LonelyError, match=r"srun --mpi=pmix started 2 .* start them with srun --mpi=pmi2"
    ):
        refuse_before_init(SRUN_PMIX, MPICH)
    with pytest.raises(LonelyError, match="a PMIx launcher started this process"):
        refuse_before_init({"PMIX_RANK": "0"}, MPICH)
    # It ends each process in MPI_Init, where Open MPI 5 lets each be alone.
    with pytest.raises(
        LaunchError,
        match=r"srun --mpi=none gives its .* Open MPI 4\.1\.4, .*; start them with srun",
    ):
        refuse_before_init(SRUN, "Open MPI v4.1.4, package: Debian OpenMPI")
    refuse_before_init(SRUN, OPEN_MPI)
    refuse_before_init(SRUN_PMIX, "Open MPI v4.1.4, package: Debian OpenMPI")
    for environment, library in (
        (OMPI_5, OPEN_MPI),
        (OMPI_5, INTEL),
        (HYDRA, MPICH),
        (SRUN_PMI2, MPICH),
        ({}, MPICH),
        (OMPI_5 | HYDRA, MPICH),
        (OMPI_5, MPICH.replace("ofi", "ofi --with-pmix=/usr")),
    ):
        refuse_before_init(environment, library)


def test_only_the_first_rank_speaks() -> None:
    with pytest.raises(LonelyError, match="why"), one_voice({"PMI_RANK": "0"}):
        raise LonelyError("why")
    with pytest.raises(SystemExit) as caught, one_voice({"PMI_RANK": "1"}):
        raise LonelyError("why")
    assert caught.value.code == LonelyError.exit_code


def test_a_fault_of_one_rank_alone_is_told_by_that_rank() -> None:
    with pytest.raises(LaunchError, match="no MPI library"), one_voice({"PMI_RANK": "1"}):
        raise LaunchError("no MPI library")


def test_the_mpirun_beside_the_library_is_named(tmp_path: Path) -> None:
    maps = (
        f"7f00-7f01 r-xp 00000000 08:01 1234   {tmp_path}/mpi/lib/libmpi.so.40\n"
        "7f02-7f03 r-xp 0 0 1 /lib/libc.so\n"
    )
    assert mpirun_of(maps) == ""
    for name in ("mpiexec", "mpirun"):
        path = tmp_path / "mpi/bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert mpirun_of(maps) == str(path)
    assert mpirun_of("") == ""


def test_the_library_at_work_is_named_shortly() -> None:
    name = named(MPI.Get_library_version()).text
    assert len(name) < 40
    assert name.split()[-1][0].isdigit(), name


def _foreign_environment(rank: int) -> dict[str, str]:
    """Return the variables of a launcher, for `rank` of 2, that this MPI ignores."""
    if "Open MPI" in MPI.Get_library_version():
        return {"PMI_RANK": str(rank), "PMI_SIZE": "2", "MPI_LOCALRANKID": str(rank)}
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
    }


START = """
import os
from mpillm.comm.failure import fail_together
from mpillm.launch.singleton import one_voice, refuse_before_init, refuse_lonely_ranks

with fail_together(None), one_voice(os.environ):
    import mpi4py
    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    from mpi4py import MPI
    library = MPI.Get_library_version()
    refuse_before_init(os.environ, library)
    MPI.Init_thread()
    refuse_lonely_ranks(os.environ, MPI.COMM_WORLD.size, library)
print(f"went on {MPI.COMM_WORLD.size}\\n", end="", flush=True)
"""


@pytest.fixture
def start(folder: Path) -> Path:
    path = folder / "start.py"
    path.write_text(START)
    return path


@pytest.mark.usefixtures("processes")
def test_a_rank_of_another_mpis_launcher_stops_with_one_line(python: Any, start: Path) -> None:
    first, second = (python(start, **_foreign_environment(rank)) for rank in (0, 1))
    assert (first.returncode, second.returncode) == (1, 1)
    assert first.stderr.count("\n") == 1, first.stderr
    assert first.stderr.startswith("mpillm: error: mpirun (")
    assert "started 2 processes, but mpi4py loaded" in first.stderr
    assert (second.stdout, second.stderr) == ("", "")


@pytest.mark.usefixtures("processes")
def test_lone_processes_that_are_meant_go_on(python: Any, start: Path) -> None:
    done = python(start, **_foreign_environment(1), MPILLM_ALONE="1")
    assert (done.returncode, done.stdout) == (0, "went on 1\n"), done.stderr
    assert python(start).stdout == "went on 1\n"


@pytest.mark.usefixtures("processes")
def test_ranks_of_the_right_mpirun_go_on(python: Any, start: Path) -> None:
    done = python(start, ranks=2)
    assert (done.returncode, done.stdout.count("went on 2")) == (0, 2), done.stderr


@pytest.mark.usefixtures("processes")
def test_the_mpirun_of_another_mpi_is_refused(python: Any, start: Path) -> None:
    other = _mpirun_of_another_mpi()
    if not other:
        pytest.skip("there is one MPI here, and no mpirun of another on PATH")
    done = python(start, before=other)
    assert done.returncode, done.stdout
    assert "went on" not in done.stdout
    said = [line for line in done.stderr.splitlines() if line.startswith("mpillm: error: mpirun (")]
    assert len(said) == 1, done.stderr
    assert "started 2 processes" in said[0]


def _mpirun_of_another_mpi() -> list[str]:
    """Return the command that starts two processes with it; empty where PATH has none."""
    ours = "Open MPI" in MPI.Get_library_version()
    # Open MPI's mpirun cannot be called by its path /bin/mpirun, where /bin leads to /usr/bin.
    folders = dict.fromkeys(
        Path(folder).resolve() for folder in os.environ["PATH"].split(os.pathsep)
    )
    for folder in [
        folder for folder in folders if folder != Path(sysconfig.get_path("scripts")).resolve()
    ]:
        mpirun = shutil.which("mpirun", path=folder)
        if mpirun:
            version = subprocess.run(
                [mpirun, "--version"], capture_output=True, text=True, check=False
            ).stdout
            if version and ("Open MPI" in version) != ours:
                return [
                    mpirun,
                    "-n",
                    "2",
                    *(["--map-by", ":OVERSUBSCRIBE"] if "Open MPI" in version else []),
                ]
    return []
