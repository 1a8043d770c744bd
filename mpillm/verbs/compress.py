"""`mpillm compress`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from mpillm.system.command_line import Debug, Json, Option
from mpillm.system.extras import require_packages
from mpillm.verbs.evaluate import Trained
from mpillm.verbs.job import limit_torch_threads, open_job


@dataclass(frozen=True)
class Compress:
    """Compress a trained model: store its weights in 8 or 4 bits, or remove some; print its size,
    loss and speed before and after. Ranks share the calibration data and the layers.
    """

    example: ClassVar = "mpirun -n 2 mpillm compress runs/quickstart --method gptq-int4 --out small"

    trained: Trained
    out: Annotated[Path, Option("The new folder to write.")]
    method: Annotated[
        str,
        Option(
            "rtn-int8, rtn-int4, gptq-int8, gptq-int4, awq-int4, smoothquant, magnitude, wanda, "
            "sparsegpt, heads, columns, or your own as package.module:Name.",
            metavar="NAME",
        ),
    ]
    data: Annotated[
        Path | None, Option("Prepared data for calibration and figures; else the run's own.")
    ] = None
    rows: Annotated[int, Option("Rows of its training split for calibration.", minimum=1)] = 64
    held_out: Annotated[int, Option("Rows of its validation split to score.", minimum=1)] = 32
    group: Annotated[int, Option("Of int4: inputs that share a scale, 32, 64, 128 or 256.")] = 64
    sparsity: Annotated[
        float, Option("Of pruning: the share of weights, heads or columns to remove.")
    ] = 0.5
    pattern: Annotated[
        str, Option("Of pruning: N zeros in each M weights, such as 2:4.", metavar="N:M")
    ] = ""
    alpha: Annotated[
        float, Option("Of smoothquant: how much range moves from inputs to weights, 0 to 1.")
    ] = 0.5
    as_json: Json = False
    debug: Debug = False

    def run(self) -> None:
        with open_job(self.debug) as job:
            require_packages("mpillm compress", "torch")
            limit_torch_threads(job.threads)
            from mpillm.infer.compress.compress_model import CompressionRequest, compress_model
            from mpillm.infer.compress.compression_method import CompressionOptions
            from mpillm.infer.compress.print_compression import print_compression
            from mpillm.system.console import Console

            options = CompressionOptions(self.group, self.sparsity, self.pattern, self.alpha)
            request = CompressionRequest(
                self.trained,
                self.out,
                self.method,
                options,
                self.data,
                self.rows,
                self.held_out,
            )
            # One JSON object is all that --json prints.
            quiet = Console(speaks=False) if self.as_json else job.console
            made = compress_model(request, job.comm, quiet)
            print_compression(made, self.out, self.as_json, job.console)
