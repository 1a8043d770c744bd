"""`mpillm chat`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from mpillm.infer.sampling import Sampling
from mpillm.system.command_line import Argument, Debug, Option
from mpillm.system.extras import require_packages
from mpillm.verbs.evaluate import Device
from mpillm.verbs.job import limit_torch_threads, open_job
from mpillm.verbs.serve import ContextTokens, Pipeline, Tensor


@dataclass(frozen=True)
class TerminalChat:
    """Talk to a chat model in the terminal: /reset forgets, /quit leaves, Ctrl-C stops an answer.

    Where the standard input is no terminal, each line is a turn.
    """

    example: ClassVar = "mpillm chat runs/chat --system 'You answer in one sentence.'"

    trained: Annotated[
        Path, Argument("A run, a checkpoint, a Hugging Face folder or a GGUF file.", metavar="RUN")
    ]
    system: Annotated[str, Option("A system message, ahead of all turns.")] = ""
    max_tokens: Annotated[int, Option("Of an answer: 1 to 1,000,000,000.")] = 1024
    temperature: Annotated[float, Option("As of `generate`; 0: always the likeliest token.")] = 0.8
    top_k: Annotated[int, Option("As of `generate`; 0: from all.")] = 50
    top_p: Annotated[float, Option("As of `generate`.")] = 1.0
    seed: Annotated[int, Option("The same seed gives the same answers.")] = 0
    tensor: Tensor = 0
    pipeline: Pipeline = 0
    context: ContextTokens = None
    device: Device = "auto"
    debug: Debug = False

    def __post_init__(self) -> None:
        self._sampling()

    def _sampling(self) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed)

    def run(self) -> None:
        with open_job(self.debug) as job:
            require_packages("mpillm chat", "torch")
            limit_torch_threads(job.threads)
            from mpillm.infer.serve.chat_terminal import chat_in_terminal
            from mpillm.infer.serve.open_engine import EngineOptions

            engine = EngineOptions(
                tensor=self.tensor,
                pipeline=self.pipeline,
                device=self.device,
                context=self.context,
            )
            given = self._sampling(), engine, job.comm, job.console
            chat_in_terminal(self.trained, self.system, *given)
