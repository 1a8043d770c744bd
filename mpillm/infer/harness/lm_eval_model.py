"""Let the installed lm-evaluation-harness drive a model that all ranks compute.

Rank 0 runs the harness, and the other ranks serve its requests until they are asked to stop. The
harness's own way, a copy on each rank, draws solved examples by the rank: figures would depend on
the number of ranks. It would also read the data, and write its results, on each of them.

This module is imported where lm-eval is installed.
"""

import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM

from mpillm.comm.waiting import patient_bcast
from mpillm.errors import MpillmError, UsageError
from mpillm.infer.chat_prompt import template_of
from mpillm.infer.harness.harness_model import HarnessModel
from mpillm.infer.harness.task_file import text_settings
from mpillm.system.messages import printable

NAME = "mpillm"
# What the verb says itself.
OWN = ("--model", "-M", "--model_args", "-a", "--device", "--batch_size", "-b", "--max_batch_size")


class RanksLM(LM):  # type: ignore[misc]
    """The model as the harness's `LM`, on rank 0: the other ranks call `serve` meanwhile.

    Batches are the model's own, whatever `batch_size` says, so that results have the same bits at
    any number of ranks.
    """

    def __init__(self, model: HarnessModel) -> None:
        super().__init__()
        self.model = model
        self.is_over = False
        """Whether the other ranks serve no longer: they were asked to stop, or all failed."""

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Score continuations after their contexts: log-likelihood and whether it is greedy."""
        found = self._ask("likelihoods", [request.args for request in requests])
        return self._kept("loglikelihood", requests, [tuple(each) for each in found])

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[Any]:
        """Score whole texts, in windows as long as the context."""
        found = self._ask("rolling", [request.args[0] for request in requests])
        return self._kept("loglikelihood_rolling", requests, found)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Continue contexts, those with equal settings together."""
        settings = [text_settings(request.args[1], "gen_kwargs", ()) for request in requests]
        found: list[str] = [""] * len(requests)
        for each in dict.fromkeys(settings):
            numbers = [number for number, own in enumerate(settings) if own == each]
            contexts = [requests[number].args[0] for number in numbers]
            for number, text in zip(numbers, self._ask("texts", contexts, each), strict=True):
                found[number] = text
        return self._kept("generate_until", requests, found)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write turns by the chat template of the checkpoint. Raises UsageError without one."""
        template = template_of(self.model.loaded)
        if template is None:
            raise UsageError(
                f"--apply_chat_template needs the template of a chat model, and "
                f"{self.model.loaded.checkpoint.folder} has none; leave it out"
            )
        text = template.render(chat_history, prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        # The model continues the last answer: what closes it is cut off.
        begun = chat_history[-1]["content"].rstrip()
        return text[: text.rindex(begun) + len(begun)]

    def chat_template(self, chat_template: bool | str = False) -> str:
        template = template_of(self.model.loaded) if chat_template else None
        return template.text if template is not None else ""

    @property
    def tokenizer_name(self) -> str:
        tokenizer = self.model.loaded.tokenizer
        return f"{tokenizer.name}-{tokenizer.sha256[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness notes with its results."""
        checkpoint = self.model.loaded.checkpoint
        return {
            "mpillm_checkpoint": str(checkpoint.folder),
            "mpillm_step": checkpoint.step,
            "mpillm_ranks": self.model.comm.size,
        }

    def stop(self, reason: BaseException | None = None) -> None:
        """Ask the other ranks to stop; they raise `reason`, if there is one. Rank 0 calls it."""
        if not self.is_over:
            self.is_over = True
            patient_bcast(self.model.comm, ("", (reason,)))

    def _ask(self, method: str, *given: Any) -> Any:
        """Let all ranks compute. Where one fails, all raise its error, and none serves on."""
        patient_bcast(self.model.comm, (method, given))
        try:
            return getattr(self.model, method)(*given)
        except BaseException:
            # An error that this rank has alone ends the job: the others wait in the same request.
            self.is_over = True
            raise

    def _kept(self, method: str, requests: Sequence[Any], found: list[Any]) -> list[Any]:
        """Give results to the harness's own cache, where it has one."""
        for request, each in zip(requests, found, strict=True):
            self.cache_hook.add_partial(method, request.args, each)
        return found


def serve(model: HarnessModel) -> None:
    """Compute what rank 0 asks for until it calls `stop`. Every other rank calls it."""
    while True:
        asked: tuple[str, tuple[Any, ...]] = patient_bcast(model.comm, ("", ()))
        method, given = asked
        if method:
            getattr(model, method)(*given)
            continue
        [reason] = given
        if reason is not None:
            raise reason
        return


def drive(model: HarnessModel, arguments: Sequence[str]) -> None:
    """Run the harness's command line with `arguments` on rank 0; the others serve.

    Every rank calls it. Raises UsageError where the harness refuses them or fails.
    """
    if model.comm.rank:
        serve(model)
        return
    lm = RanksLM(model)
    try:
        _run(lm, arguments)
    except MpillmError as failure:
        lm.stop(failure)
        raise
    except SystemExit as failure:
        # The harness has printed its reason, or its help.
        lm.stop(failure if failure.code else None)
        if failure.code:
            raise
    except Exception as failure:
        if lm.is_over:
            raise
        words = f"{type(failure).__name__}: {printable(str(failure))}"
        error = UsageError(f"lm-eval failed: {words:.1000}; --debug shows where")
        lm.stop(error)
        raise error from failure
    lm.stop()


def _run(lm: RanksLM, arguments: Sequence[str]) -> None:
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.registry import register_model
    from lm_eval.utils import setup_logging

    for word in arguments:
        if word.partition("=")[0] in OWN:
            raise UsageError(
                f"{word} is of lm-eval's other models; `mpillm lm-eval` sets the model, its device "
                "and its batches"
            )

    @register_model(NAME)
    class OpenedLM(RanksLM):
        """The model that is open already, under its name for the command line."""

        @classmethod
        def create_from_arg_obj(cls, arg_dict: Any, additional_config: Any = None) -> RanksLM:
            return lm

    folder = lm.model.loaded.checkpoint.folder
    own = ["run", "--model", NAME, "--model_args", f"checkpoint={folder}"]
    before = sys.argv
    sys.argv = ["lm-eval", *own, *arguments]
    try:
        setup_logging()
        cli = HarnessCLI()
        cli.execute(cli.parse_args())
    finally:
        sys.argv = before
