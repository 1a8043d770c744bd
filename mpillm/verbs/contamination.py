"""`mpillm contamination`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from mpillm.system.command_line import Argument, Debug, Json, Option
from mpillm.verbs.job import open_job

# Longer passages than any context.
MOST_TOKENS, MOST_TIMES = 1 << 20, 1 << 40


@dataclass(frozen=True)
class ContaminationOptions:
    """Find rows of an evaluation set in training text: passages of tokens that both have.

    Both are prepared folders of one tokenizer; ranks search the training shards side by side.
    """

    example: ClassVar = "mpirun -n 4 mpillm contamination prepared/web prepared/questions"

    training: Annotated[Path, Argument("The prepared folder that a run learns.", metavar="DATA")]
    evaluation: Annotated[
        Path | None,
        Argument(
            "The prepared folder to find in it: its validation split, or all where it has none; "
            "else the validation split of DATA.",
            metavar="EVALUATION",
        ),
    ] = None
    tokens: Annotated[
        int,
        Option("Tokens in a row that both must have.", minimum=2, maximum=MOST_TOKENS),
    ] = 13
    ignore_above: Annotated[
        int,
        Option(
            "Leave out passages that the training text has more often, as common phrases; 0: none.",
            minimum=0,
            maximum=MOST_TIMES,
        ),
    ] = 0
    outputs: Annotated[
        Path | None, Option("A new file for all rows that were found, in JSON lines.")
    ] = None
    as_json: Json = False
    debug: Debug = False

    def run(self) -> None:
        with open_job(self.debug) as job:
            from mpillm.infer.leakage.print_contamination import print_contamination

            print_contamination(
                self.training,
                self.evaluation,
                self.tokens,
                self.ignore_above,
                self.outputs,
                self.as_json,
                job.comm,
                job.console,
            )
