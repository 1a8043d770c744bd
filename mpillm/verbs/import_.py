"""`mpillm import`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from mpillm.system.command_line import Argument, Debug, Option
from mpillm.system.extras import require_packages
from mpillm.verbs.job import limit_torch_threads, open_job


@dataclass(frozen=True)
class Import:
    """Import a published model, a Hugging Face folder or a GGUF file, as a checkpoint to generate,
    evaluate and train with; or a folder of PEFT's adapters.
    """

    example: ClassVar = "mpirun -n 2 mpillm import SmolLM2-135M --out runs/smollm2"

    source: Annotated[
        Path, Argument("The model's folder, or its GGUF file.", metavar="FOLDER|FILE")
    ]
    out: Annotated[Path, Option("The new folder to write.")]
    end_of_text: Annotated[
        str | None, Option("The token that ends a document; else config.json's.", metavar="TOKEN")
    ] = None
    base: Annotated[
        Path | None,
        Option("Of adapters: a run or an imported model; else the one that they name."),
    ] = None
    debug: Debug = False

    def run(self) -> None:
        with open_job(self.debug) as job:
            require_packages("mpillm import", "torch")
            limit_torch_threads(job.threads)
            from mpillm.infer.import_model import import_model, print_import

            found = import_model(
                self.source, self.out, job.comm, job.console, self.end_of_text, self.base
            )
            print_import(found, self.out, job.console)
