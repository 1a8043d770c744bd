"""Slurm: sbatch(1), squeue(1), scontrol(1), sacct(1), and "output environment variables"."""

from collections.abc import Mapping
from pathlib import Path

from mpillm.errors import LaunchError
from mpillm.launch.schedulers.batch_system import (
    QUESTION_SECONDS,
    BatchSystem,
    StateQuery,
    find_program,
    run_program,
)


class _Slurm(BatchSystem):
    def hosts(self, environment: Mapping[str, str]) -> list[str]:
        """Expand the variable's list, such as `n[1-3]`, by scontrol."""
        listed = environment.get(self.hosts_variable, "")
        scontrol = find_program("scontrol", environment)
        if listed and scontrol:
            words = [scontrol, "show", "hostnames", listed]
            try:
                done = run_program(words, environment, QUESTION_SECONDS)
            except LaunchError:
                done = None
            if done is not None and done.returncode == 0:
                return done.stdout.split()
        return [] if "[" in listed or not listed else listed.split(",")


SLURM = _Slurm(
    title="Slurm",
    # --chdir is an option here and not a directive: an argument may hold any character.
    submit=("sbatch", "--parsable", "--chdir={folder}", "job.sh"),
    answer=r"^(\d+)(?:;\S+)?$",
    queries=(
        StateQuery(("squeue", "-h", "-j", "{job}", "-o", "%T"), r"^(\w+)"),
        # squeue forgets a job minutes after its end.
        StateQuery(("scontrol", "show", "job", "{job}"), r"JobState=(\w+)"),
        StateQuery(("sacct", "-n", "-X", "-j", "{job}", "-o", "State"), r"^\s*(\w+)"),
    ),
    over=frozenset(
        {
            "BOOT_FAIL",
            "CANCELLED",
            "COMPLETED",
            "DEADLINE",
            "FAILED",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "PREEMPTED",
            "REVOKED",
            "TIMEOUT",
        }
    ),
    template=Path("slurm.sh"),
    has_qos=True,
    launcher="srun",
    own_launchers=("srun",),
    job_variable="SLURM_JOB_ID",
    restart_variable="SLURM_RESTART_COUNT",
    end_variable="SLURM_JOB_END_TIME",
    hosts_variable="SLURM_JOB_NODELIST",
    cpus_variable="SLURM_CPUS_ON_NODE",
)
