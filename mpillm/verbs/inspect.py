"""`mpillm inspect`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from mpillm.system.command_line import Argument, Debug, Json, Option
from mpillm.system.extras import require_packages
from mpillm.verbs.job import limit_torch_threads, open_job


@dataclass(frozen=True)
class Inspect:
    """Show the tensors of a run, a checkpoint, a Hugging Face folder, a safetensors or a GGUF file:
    their shapes, dtypes and norms; or how two of these differ.
    """

    example: ClassVar = "mpillm inspect runs/quickstart --match 'model/*'"

    source: Annotated[
        Path, Argument("A run, a checkpoint, a folder or a file with weights.", metavar="PATH")
    ]
    diff: Annotated[Path | None, Option("Compare with this source, name by name.")] = None
    match: Annotated[
        tuple[str, ...],
        Option("Only names of this form (* matches all).", metavar="A,B,…", commas=True),
    ] = ()
    as_json: Json = False
    debug: Debug = False

    def run(self) -> None:
        with open_job(self.debug) as job:
            require_packages("mpillm inspect", "torch")
            limit_torch_threads(job.threads)
            from mpillm.infer.inspect_weights import print_inspection

            print_inspection(
                self.source, self.diff, self.match, self.as_json, job.comm, job.console
            )
