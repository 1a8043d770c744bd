"""Models in torch with one face: greedy tokens after a prompt, and the loss of a text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from torch.nn import functional as F

from mpillm.infer.generate import sample_tokens
from mpillm.infer.loading import load_trained
from mpillm.infer.sampling import Sampling
from mpillm.system.console import Console


class Ours:
    """The model of a run or a checkpoint, in float32."""

    def __init__(self, path: Path) -> None:
        loaded = load_trained(path, MPI.COMM_SELF, Console(speaks=False))
        self.model, self.tokenizer = loaded.model, loaded.tokenizer

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return the `count` tokens that follow `prompt`."""
        sampling = Sampling(max_tokens=count, temperature=0)
        return list(sample_tokens(self.model, list(prompt), sampling))

    def losses(self, window: Sequence[int]) -> list[float]:
        """Return the negative log-likelihood of each token of the window but the first one."""
        return _losses(self.model, window)


class Transformers:
    """A Hugging Face folder, or a GGUF file, as transformers reads it in float32."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        file = {"gguf_file": path.name} if path.is_file() else {}
        folder = path.parent if file else path
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
        self.model: Any = model.eval()

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return the `count` tokens that follow `prompt`."""
        found = self.model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=count,
            # An end of text ends nothing, as in `sample_tokens`.
            eos_token_id=None,
        )
        return list(found[0, len(prompt) :].tolist())

    def losses(self, window: Sequence[int]) -> list[float]:
        """Return the negative log-likelihood of each token of the window but the first one."""
        return _losses(lambda ids: self.model(ids).logits, window)


def _losses(logits: Any, window: Sequence[int]) -> list[float]:
    ids_T = torch.tensor(list(window))
    with torch.inference_mode():
        return list(
            F.cross_entropy(logits(ids_T[None, :-1])[0], ids_T[1:], reduction="none").tolist()
        )
