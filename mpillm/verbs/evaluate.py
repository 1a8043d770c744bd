"""`mpillm evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from mpillm.system.command_line import Argument, Debug, Json, Option
from mpillm.system.extras import require_packages
from mpillm.verbs.job import limit_torch_threads, open_job

Trained = Annotated[
    Path, Argument("A run's folder, or one of its checkpoints.", metavar="RUN|CHECKPOINT")
]


Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    Option("Where to compute; auto: on a GPU a rank, where all ranks see one."),
]


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a model on all validation data: loss, perplexity, bits per byte, other metrics."""

    example: ClassVar = "mpirun -n 2 mpillm evaluate runs/quickstart --baselines"

    trained: Trained
    other: Annotated[
        Path | None,
        Argument("Compare it with another one on the same data.", metavar="OTHER"),
    ] = None
    data: Annotated[Path | None, Option("Another prepared folder than the run's own.")] = None
    baselines: Annotated[bool, Option("Score simple models too.")] = False
    metrics: Annotated[
        tuple[str, ...],
        Option(
            "Metrics, also your own as package.module:Name; else the task's.",
            metavar="A,B,…",
            commas=True,
        ),
    ] = ()
    calibrate: Annotated[
        bool,
        Option("Fit a classifier's temperature on half of the rows; test it on the others."),
    ] = False
    device: Device = "auto"
    as_json: Json = False
    debug: Debug = False

    def run(self) -> None:
        with open_job(self.debug) as job:
            require_packages("mpillm evaluate", "torch")
            limit_torch_threads(job.threads)
            from mpillm.infer.print_evaluation import print_evaluation

            print_evaluation(
                self.trained,
                self.data,
                self.baselines,
                self.as_json,
                job.comm,
                job.console,
                self.metrics,
                self.device,
                self.other,
                self.calibrate,
            )
