"""`mpillm lm-eval`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from mpillm.errors import UsageError
from mpillm.system.command_line import Argument, Debug
from mpillm.system.extras import require_packages
from mpillm.verbs.evaluate import Device, Trained
from mpillm.verbs.job import limit_torch_threads, open_job


@dataclass(frozen=True)
class LmEval:
    """Let the installed lm-evaluation-harness evaluate a model on all ranks.

    Rank 0 runs its command line with what follows `--`, and the ranks share its requests.
    """

    example: ClassVar = (
        "mpirun -n 2 mpillm lm-eval runs/quickstart -- --tasks sums --include_path tasks"
    )

    trained: Trained
    arguments: Annotated[
        tuple[str, ...],
        Argument("After `--`: the options of lm-eval, such as --tasks.", metavar="-- OPTION…"),
    ] = ()
    device: Device = "auto"
    debug: Debug = False

    def __post_init__(self) -> None:
        if not self.arguments:
            raise UsageError(
                "mpillm lm-eval needs the options of lm-eval after `--`, such as "
                "`-- --tasks NAME --include_path FOLDER`"
            )

    def run(self) -> None:
        with open_job(self.debug) as job:
            require_packages("mpillm lm-eval", "torch", "lm_eval")
            limit_torch_threads(job.threads)
            from mpillm.infer.harness.harness_model import open_model_for_harness
            from mpillm.infer.harness.lm_eval_model import drive

            given = self.trained, job.comm, job.console, self.device
            drive(open_model_for_harness(*given), self.arguments)
