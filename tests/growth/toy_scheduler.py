"""A toy batch system: a spool directory. A job is a file in it, and its state another file."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from mpillm.errors import LaunchError
from mpillm.launch.schedulers.batch_system import BatchSystem


@dataclass(frozen=True)
class Spool(BatchSystem):
    folder_variable: str = "SPOOL_FOLDER"

    def submit_script(self, folder, environment):
        spool = Path(environment.get(self.folder_variable, ""))
        if not spool.is_absolute():
            raise LaunchError(f"{self.folder_variable} names no spool; set it to a folder")
        number = len(list(spool.glob("*.sh"))) + 1
        shutil.copy(Path(folder) / "job.sh", spool / f"{number}.sh")
        (spool / f"{number}.state").write_text("SPOOLED\n")
        return str(number)

    def job_state(self, job, environment):
        file = Path(environment[self.folder_variable]) / f"{job}.state"
        return file.read_text().strip() if file.exists() else None

    def write_time(self, seconds):
        return str(seconds)


SPOOL = Spool(
    title="the spool",
    submit=("spool",),
    over=frozenset({"GONE"}),
    template=Path(__file__).with_suffix(".sh"),
    job_variable="SPOOL_JOB",
    end_variable="SPOOL_END",
)
