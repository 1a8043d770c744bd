"""PBS Professional and OpenPBS: qsub(1B), qstat(1B)."""

from pathlib import Path

from mpillm.launch.schedulers.batch_system import BatchSystem, StateQuery

PBS = BatchSystem(
    title="PBS",
    submit=("qsub", "job.sh"),
    answer=r"^(\d+(?:\[\d*\])?(?:\.[\w.-]+)?)$",
    queries=(StateQuery(("qstat", "-f", "-x", "{job}"), r"job_state = (\w)"),),
    # qstat(1B), the job states: PBS answers by a letter.
    state_words={
        "B": "BEGUN",
        "E": "EXITING",
        "F": "FINISHED",
        "H": "HELD",
        "M": "MOVED",
        "Q": "QUEUED",
        "R": "RUNNING",
        "S": "SUSPENDED",
        "T": "MOVING",
        "U": "SUSPENDED",
        "W": "WAITING",
        "X": "FINISHED",
        "C": "COMPLETED",
    },
    over=frozenset({"FINISHED", "MOVED", "COMPLETED"}),
    template=Path("pbs.sh"),
    job_variable="PBS_JOBID",
    hosts_variable="PBS_NODEFILE",
)
