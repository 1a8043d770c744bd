"""`mpillm report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from mpillm.system.command_line import Argument, Debug, Option
from mpillm.verbs.job import first_process


@dataclass(frozen=True)
class Report:
    """Draw a run as one HTML file that needs no network: curves, hosts, recipe, restarts."""

    example: ClassVar = "mpillm report runs/quickstart --out quickstart.html"

    folder: Annotated[Path, Argument("A run's folder.", metavar="RUN")]
    out: Annotated[Path | None, Option("Instead of RUN/report.html.", metavar="FILE.html")] = None
    debug: Debug = False

    def run(self) -> None:
        with first_process(self.debug) as console:
            from mpillm.runs.report.run_report import write_report

            write_report(self.folder, console, self.out)
