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
    """Export a trained model: a Hugging Face folder that transformers loads, safetensors, a GGUF
    file that llama.cpp loads, or the adapters that PEFT loads.
    """

    example: ClassVar = "mpillm export runs/quickstart --out exported --dtype bfloat16"

    trained: Trained
    out: Annotated[Path, Option("The new folder to write; of gguf, the new file *.gguf.")]
    to: Annotated[
        Literal["hf", "safetensors", "gguf", "peft", "compressed-tensors"],
        Option(
            "hf: with the names and config.json of Hugging Face; safetensors: our names; gguf. "
            "Adapters are merged with their base; peft: the adapters alone; compressed-tensors: "
            "the codes of a compressed model."
        ),
    ] = "hf"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"],
        Option(
            "Of the tensors; auto: that of an imported model, else float32; q…: gguf's quantised."
        ),
    ] = "auto"
    debug: Debug = False

    def run(self) -> None:
        with open_job(self.debug) as job:
            require_packages("mpillm export", "torch")
            limit_torch_threads(job.threads)
            from mpillm.infer.export_model import export_model, print_export

            made = export_model(self.trained, self.out, self.to, self.dtype, job.comm, job.console)
            print_export(made, job.console)
