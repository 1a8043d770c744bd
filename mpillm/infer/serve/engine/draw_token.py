"""Draw the next tokens of texts with settings of their own, and report their probabilities.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mpillm.infer.decoding.token_rows import draw_tokens
from mpillm.infer.serve.requests import TextRequest, TokenLogprob


@dataclass
class TokenDraw:
    """The draws of one text: the same seed gives the tokens of `mpillm generate`."""

    request: TextRequest
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.request.sampling.seed)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken as it is."""
        request = self.request
        return request.sampling.greedy and not request.bias and request.constraint is None

    def draw(self, logits_V: Tensor) -> int:
        """Draw a token by the text's bias, constraint and sampling."""
        request = self.request
        if request.bias or request.constraint is not None:
            logits_V = logits_V.clone()
        for token, bias in request.bias.items():
            logits_V[token] += bias
        allowed = None if request.constraint is None else request.constraint.allowed()
        if allowed is not None:
            bits = np.unpackbits(np.frombuffer(allowed, np.uint8), bitorder="little")
            masked_V = torch.ones(len(logits_V), dtype=torch.bool)
            known = min(len(bits), len(logits_V))
            masked_V[:known] = torch.from_numpy(bits[:known] == 0)
            if masked_V.all():
                raise ValueError("no token may come next")
            logits_V.masked_fill_(masked_V.to(logits_V.device), -torch.inf)
        return draw_tokens(logits_V[None], request.sampling, [self.generator])[0]


def draw_all(draws: Sequence[TokenDraw], logits: Sequence[Tensor]) -> list[int | Exception]:
    """Draw a token of each text from its logits (V,); those that are plain together.

    Where a constraint fails or allows no token, its text has the exception.
    """
    plain = [number for number, draw in enumerate(draws) if draw.is_plain]
    found: dict[int, int | Exception] = {}
    if plain:
        together_BV = torch.stack([logits[number] for number in plain])
        found = dict(zip(plain, together_BV.argmax(-1).tolist(), strict=True))
    for number, (draw, logits_V) in enumerate(zip(draws, logits, strict=True)):
        if number not in found:
            try:
                found[number] = draw.draw(logits_V)
            except Exception as failure:
                found[number] = failure
    return [found[number] for number in range(len(draws))]


def token_logprobs(
    logits_BV: Tensor, tokens: Sequence[int], top_logprobs: int
) -> list[TokenLogprob]:
    """Return the log-probability of each row's token, with the likeliest ones, in float64."""
    logs_BV = logits_BV.double().log_softmax(-1)
    values, best = (each.tolist() for each in logs_BV.topk(top_logprobs))
    tokens_B1 = torch.tensor(tokens, device=logs_BV.device)[:, None]
    own = logs_BV.gather(1, tokens_B1)[:, 0].tolist()
    return [
        TokenLogprob(token, log, tuple(zip(*likeliest, strict=True)))
        for token, log, *likeliest in zip(tokens, own, best, values, strict=True)
    ]
