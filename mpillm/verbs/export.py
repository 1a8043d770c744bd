"""`mpillm export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from mpillm.system.command_line import Debug, Option
from mpillm.system.extras import require_packages
from mpillm.verbs.evaluate import Trained
from mpillm.verbs.job import limit_torch_threads, open_job


@dataclass(frozen=True)
class Export:
    """Export a trained model: a Hugging Face folder that transformers loads, or safetensors."""

    example: ClassVar = "mpillm export runs/quickstart --out exported --dtype bfloat16"

    trained: Trained
    out: Annotated[Path, Option("The new folder to write.")]
    to: Annotated[
        Literal["hf", "safetensors"],
        Option("hf: with the names and config.json of Hugging Face; safetensors: our names."),
    ] = "hf"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option("Of the tensors; auto: that of an imported model, else float32."),
    ] = "auto"
    debug: Debug = False

    def run(self) -> None:
        with open_job(self.debug) as job:
            require_packages("mpillm export", "torch")
            limit_torch_threads(job.threads)
            from mpillm.infer.export_model import export_model, print_export

            made = export_model(self.trained, self.out, self.to, self.dtype, job.comm, job.console)
            print_export(made, job.console)
