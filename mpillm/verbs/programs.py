"""`mpillm programs`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from mpillm.system.command_line import Argument, Debug, Json, Option
from mpillm.verbs.job import open_job

MOST_SECONDS, MOST_MEBIBYTES = 3600, 1 << 20


@dataclass(frozen=True)
class Programs:
    """Score programs that a model wrote by the tests that they pass: pass@k.

    Files are JSON lines as of HumanEval: a problem has task_id, prompt, test and entry_point, a
    sample task_id and completion. No model is loaded, and nothing runs without --run-programs.
    """

    example: ClassVar = (
        "mpirun -n 4 mpillm programs HumanEval.jsonl samples.jsonl --run-programs --metrics pass@1"
    )

    problems: Annotated[Path, Argument("A file of problems with tests.", metavar="PROBLEMS")]
    samples: Annotated[Path, Argument("A file of completions.", metavar="SAMPLES")]
    run_programs: Annotated[
        bool,
        Option(
            "Allow to run them: each with its tests, by Python, in a sandbox of its own without "
            "network and without your files."
        ),
    ] = False
    metrics: Annotated[
        tuple[str, ...],
        Option(
            "Metrics; else pass@1, pass@10 and pass@100, as far as there are samples.",
            metavar="A,B,…",
            commas=True,
        ),
    ] = ()
    seconds: Annotated[
        int,
        Option("Processor time of a program.", minimum=1, maximum=MOST_SECONDS),
    ] = 5
    memory: Annotated[
        int, Option("Memory of a program, in MiB.", minimum=64, maximum=MOST_MEBIBYTES)
    ] = 512
    as_json: Json = False
    debug: Debug = False

    def run(self) -> None:
        with open_job(self.debug) as job:
            from mpillm.infer.programs.print_programs import ProgramOptions, print_programs
            from mpillm.infer.programs.run_programs import ProgramLimits

            limits = ProgramLimits(self.seconds, self.memory << 20)
            options = ProgramOptions(self.run_programs, self.metrics, limits, self.as_json)
            print_programs(self.problems, self.samples, options, job.comm, job.console)
