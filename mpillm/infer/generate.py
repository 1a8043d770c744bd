"""Text from a model, token by token, with a key/value cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mpillm.errors import UsageError
from mpillm.models.part_module import PartModule
from mpillm.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """Settings by which the next token is drawn from the logits.

    `temperature` 0 takes the likeliest; `top_k` 0 and `top_p` 1 are off.
    """

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, fits in (
            ("max-tokens", self.max_tokens, self.max_tokens > 0),
            ("temperature", self.temperature, self.temperature >= 0),
            ("top-k", self.top_k, self.top_k >= 0),
            ("top-p", self.top_p, 0 < self.top_p <= 1),
        ):
            if not fits:
                raise UsageError(f"--{name} {value} is out of range; see mpillm generate --help")


def generate(
    model: PartModule, tokenizer: Tokenizer, prompt: str, sampling: Sampling
) -> Iterator[str]:
    """Yield pieces of text that follow the prompt, until `max_tokens` or the end of the document.

    The same seed yields the same text. An empty prompt begins a new document.
    """
    decoder = tokenizer.stream()
    for token in sample_tokens(model, tokenizer.encode(prompt) or [tokenizer.eot_id], sampling):
        if token == tokenizer.eot_id:
            break
        yield decoder.push(token)
    yield decoder.finish()


def sample_tokens(model: PartModule, prompt: list[int], sampling: Sampling) -> Iterator[int]:
    """Yield `max_tokens` token ids that follow `prompt`.

    When the text exceeds the model's context, its older half is dropped and the cache is filled
    again.
    """
    context = model.spec.context
    # No more of a long prompt than the model can see.
    seen = prompt[-context:]
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = model.make_cache(1)
    new = seen
    for _ in range(sampling.max_tokens):
        if cache.length + len(new) > context:
            seen = seen[-(context // 2 or 1) :]
            cache, new = model.make_cache(1), seen
        with torch.inference_mode():
            logits_V = model.next_logits(torch.tensor([new]), cache)[0, -1]
        token = draw_token(logits_V, sampling, generator)
        seen, new = [*seen, token], [token]
        yield token


def draw_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a token id: top-k, then top-p (nucleus sampling, Holtzman et al. 2020)."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.float() / sampling.temperature
    if 0 < sampling.top_k < logits_V.numel():
        logits_V = logits_V.masked_fill(
            logits_V < logits_V.topk(sampling.top_k).values[-1], -torch.inf
        )
    probability_V = logits_V.softmax(0)
    if sampling.top_p < 1:
        sorted_V, order_V = probability_V.sort(descending=True)
        # A token is kept while the likelier ones do not fill the nucleus: so at least one is kept.
        outside_V = sorted_V.cumsum(0) - sorted_V >= sampling.top_p
        probability_V = probability_V.index_fill(0, order_V[outside_V], 0.0)
    return int(torch.multinomial(probability_V, 1, generator=generator))
