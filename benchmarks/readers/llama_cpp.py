"""llama.cpp as a reader of GGUF files: its server, inside of this process, by xllamacpp."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class LlamaCpp:
    """A server of one model on one thread, greedy; text and tokens as llama.cpp reads them."""

    def __init__(self, path: Path, context: int) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel = context, 1
        parameters.warmup = False
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        self._server = xllamacpp.Server(parameters)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del self._server

    def _ask(self, path: str, **request: Any) -> Any:
        question = urllib.request.Request(
            f"{self._server.listening_address}/{path}",
            json.dumps(request).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(question, timeout=600) as answer:
            return json.loads(answer.read())

    def _complete(self, prompt: Sequence[int], count: int, **more: Any) -> Any:
        return self._ask(
            "completion",
            prompt=list(prompt),
            n_predict=count,
            temperature=0,
            cache_prompt=True,
            return_tokens=True,
            **more,
        )

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return the `count` tokens that follow `prompt`, fewer where the text ends."""
        return list(self._complete(prompt, count, n_probs=0)["tokens"])

    def losses(self, window: Sequence[int]) -> list[float]:
        """Return the negative log-likelihood of each token of the window but the first one."""
        found = []
        for at in range(1, len(window)):
            # The bias forces the token; its probability is given without.
            bias = [[window[at], 1000.0]]
            forced = self._complete(window[:at], 1, n_probs=1, logit_bias=bias)
            if forced["tokens"] != [window[at]]:
                raise RuntimeError(f"token {window[at]} was not forced: {forced['tokens']}")
            found.append(-forced["completion_probabilities"][0]["logprob"])
        return found

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, with no special ones."""
        asked = {"content": text, "add_special": False, "parse_special": False}
        return list(self._ask("tokenize", **asked)["tokens"])
