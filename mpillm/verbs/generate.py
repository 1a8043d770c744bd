"""`mpillm generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from mpillm.errors import UsageError
from mpillm.infer.sampling import Sampling, check_prompt
from mpillm.system.command_line import Debug, Option
from mpillm.system.extras import require_packages
from mpillm.verbs.evaluate import Device, Trained
from mpillm.verbs.job import limit_torch_threads, open_job


@dataclass(frozen=True)
class Generate:
    """Continue a prompt, answer it as a chat model, or translate it by an encoder-decoder.

    Rank 0 computes and prints. With --prompts all ranks share the prompts of a file.
    """

    example: ClassVar = "mpillm generate runs/quickstart --prompt 'def ' --max-tokens 100 --seed 1"

    trained: Trained
    prompt: Annotated[
        str | None, Option("The text to continue, or the source to translate, in UTF-8.")
    ] = None
    prompts: Annotated[
        Path | None,
        Option("A file of prompts, one a line or JSON lines: all ranks write JSON lines."),
    ] = None
    max_tokens: Annotated[int, Option("The largest number of tokens: 1 to 1,000,000,000.")] = 200
    temperature: Annotated[
        float, Option("0 to 1,000,000; 0, or below 0.000001: always the likeliest token.")
    ] = 0.8
    top_k: Annotated[int, Option("From 0: draw from the k likeliest; 0: from all.")] = 50
    top_p: Annotated[
        float,
        Option("Above 0, at most 1: draw from the likeliest that make up this probability."),
    ] = 1.0
    seed: Annotated[int, Option("0 to 2^63 − 1: the same seed gives the same text.")] = 0
    chat: Annotated[
        bool | None,
        Option(
            "Whether the prompt is a user's turn, by the model's chat template; else where "
            "the run learnt conversations: chat, dpo, kto.",
            flag="--chat/--plain",
        ),
    ] = None
    device: Device = "auto"
    debug: Debug = False

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise UsageError("mpillm generate needs a --prompt TEXT or a file, --prompts FILE")
        if self.prompts is not None and self.chat is not None:
            raise UsageError(
                '--chat and --plain are of one --prompt; a file has lines {"messages": […]}'
            )
        if self.prompt is not None:
            check_prompt(self.prompt)
        self._sampling()

    def _sampling(self) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed)

    def run(self) -> None:
        with open_job(self.debug) as job:
            require_packages("mpillm generate", "torch")
            limit_torch_threads(job.threads)
            given = self._sampling(), job.comm, job.console, self.device
            if self.prompts is not None:
                from mpillm.infer.serve.generate_prompts import print_texts

                print_texts(self.trained, self.prompts, *given)
                return
            from mpillm.infer.print_generation import print_generation

            assert self.prompt is not None
            print_generation(self.trained, self.prompt, *given, self.chat)
