"""`mpillm generate`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from mpillm.system.command_line import Debug, Option
from mpillm.system.extras import require_packages
from mpillm.verbs.evaluate import Trained
from mpillm.verbs.job import limit_torch_threads, open_job


@dataclass(frozen=True)
class Generate:
    """Continue a prompt; rank 0 computes and prints."""

    example: ClassVar = "mpillm generate runs/quickstart --prompt 'def ' --max-tokens 100 --seed 1"

    trained: Trained
    prompt: Annotated[str, Option("The text to continue.")]
    max_tokens: Annotated[int, Option("The largest number of tokens.")] = 200
    temperature: Annotated[float, Option("0: always the likeliest token.")] = 0.8
    top_k: Annotated[int, Option("Draw from the k likeliest; 0: from all.")] = 50
    top_p: Annotated[float, Option("Draw from the likeliest that make up this probability.")] = 1.0
    seed: Annotated[int, Option("The same seed gives the same text.")] = 0
    debug: Debug = False

    def run(self) -> None:
        with open_job(self.debug) as job:
            require_packages("mpillm generate", "torch")
            limit_torch_threads(job.threads)
            from mpillm.infer.generate import Sampling
            from mpillm.infer.print_results import print_generation

            sampling = Sampling(
                self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed
            )
            print_generation(self.trained, self.prompt, sampling, job.comm, job.console)
