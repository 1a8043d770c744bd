"""IBM Spectrum LSF: bsub, bjobs, and the environment variables of its jobs."""

from pathlib import Path

from mpillm.launch.schedulers.batch_system import BatchSystem, StateQuery


class _Lsf(BatchSystem):
    def write_time(self, seconds: int) -> str:
        """Write 5,400 as `1:30`: hours and minutes, rounded up."""
        minutes = -(-seconds // 60)
        return f"{minutes // 60}:{minutes % 60:02d}"


LSF = _Lsf(
    title="LSF",
    submit=("bsub",),
    by_input=True,
    answer=r"^Job <(\d+)> is submitted",
    queries=(StateQuery(("bjobs", "-noheader", "-o", "stat", "{job}"), r"^\s*([A-Z]+)"),),
    over=frozenset({"DONE", "EXIT", "ZOMBI"}),
    template=Path("lsf.sh"),
    # LSF itself sends USR2 at the limit. The scripts ask for URG before it: a process ignores URG
    # by default, so that it kills no ssh on its way to the ranks.
    limit_signals="URG USR1 USR2",
    # LSF requeues a job that exits with 75, so a job that gives up must leave with another code.
    given_up_code=1,
    own_launchers=("jsrun",),
    job_variable="LSB_JOBID",
    hosts_variable="LSB_DJOB_HOSTFILE",
)
