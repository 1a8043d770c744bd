"""`mpillm memorisation`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from mpillm.system.command_line import Debug, Json, Option
from mpillm.system.extras import require_packages
from mpillm.verbs.evaluate import Device, Trained
from mpillm.verbs.job import limit_torch_threads, open_job

MOST_PASSAGES, MOST_TOKENS, MOST_SEED = 10_000_000, 1 << 20, (1 << 63) - 1


@dataclass(frozen=True)
class MemorisationOptions:
    """Measure how much training text a model writes again when it is given the text ahead of it.

    Passages of the validation text are continued, too: what is right there is no memory.
    """

    example: ClassVar = "mpirun -n 2 mpillm memorisation runs/quickstart --outputs copied.jsonl"

    trained: Trained
    data: Annotated[Path | None, Option("Another prepared folder than the run's own.")] = None
    passages: Annotated[
        int, Option("Passages to draw of each split.", minimum=1, maximum=MOST_PASSAGES)
    ] = 1000
    prompt_tokens: Annotated[
        int | None,
        Option(
            "Tokens that the model is given; else 50, or half of the context.",
            minimum=1,
            maximum=MOST_TOKENS,
        ),
    ] = None
    tokens: Annotated[
        int | None,
        Option(
            "Tokens that should follow; else 50, or half of the context.",
            minimum=1,
            maximum=MOST_TOKENS,
        ),
    ] = None
    texts: Annotated[
        Path | None,
        Option("A file of texts to try in place of drawn passages, a line each, such as secrets."),
    ] = None
    seed: Annotated[
        int,
        Option("The same seed draws the same passages.", minimum=0, maximum=MOST_SEED),
    ] = 0
    outputs: Annotated[Path | None, Option("A new file for all passages, in JSON lines.")] = None
    device: Device = "auto"
    as_json: Json = False
    debug: Debug = False

    def run(self) -> None:
        with open_job(self.debug) as job:
            require_packages("mpillm memorisation", "torch")
            limit_torch_threads(job.threads)
            from mpillm.infer.leakage.print_memorisation import (
                MemorisationSettings,
                print_memorisation,
            )

            asked = MemorisationSettings(
                self.passages,
                self.prompt_tokens,
                self.tokens,
                self.seed,
                self.texts,
                self.outputs,
                self.as_json,
            )
            print_memorisation(self.trained, self.data, asked, job.comm, job.console, self.device)
