"""Rows of token ids that a model continues together, each with its own length and end.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mpillm.errors import CheckpointError
from mpillm.infer.sampling import Sampling
from mpillm.models.part_module import Fields, PartModule


class TokenRows:
    """The state of rows between their tokens: ask for `logits`, then `push` a token a row.

    The cache holds each row's own positions, as if it were alone: no padding ahead of a prompt.
    """

    def __init__(
        self, model: PartModule, prompts: Sequence[Sequence[int]], source: Fields | None = None
    ) -> None:
        """Begin rows with `prompts`, one id at least and at most the context; `source`: what an
        encoder-decoder reads, a row each.
        """
        self._model = model
        self.device = next(model.parameters()).device
        lengths = [len(prompt) for prompt in prompts]
        ids_BT = torch.zeros((len(prompts), max(lengths)), dtype=torch.int64)
        for row, prompt in zip(ids_BT, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        self._new_BT = ids_BT.to(self.device)
        self._lengths_B = torch.tensor(lengths, device=self.device)
        with torch.inference_mode():
            self._cache = (
                model.make_cache(len(prompts)) if source is None else model.encode_source(source)
            )

    def __len__(self) -> int:
        return len(self._new_BT)

    @property
    def is_full(self) -> bool:
        """Whether the context has no place for the newest token of the longest row."""
        return self._cache.length + self._new_BT.shape[1] > self._model.spec.context

    def logits(self) -> Tensor:
        """Compute the logits (B, V), float32, of each row's next token.

        Raises CheckpointError where they are not finite.
        """
        with torch.inference_mode():
            logits_BV = self._model.last_logits(self._new_BT, self._lengths_B, self._cache).float()
        if not logits_BV.isfinite().all():
            raise CheckpointError(
                "the model's outputs are NaN or infinite, so no token can be drawn: the run "
                "diverged; name an earlier checkpoint"
            )
        return logits_BV

    def push(self, tokens_B: Tensor) -> None:
        """Append a token to each row."""
        self._new_BT = tokens_B.to(self.device)[:, None]
        self._lengths_B = torch.ones(len(tokens_B), dtype=torch.int64, device=self.device)

    def select(self, rows_N: Tensor) -> None:
        """Keep the rows with these numbers, in this order; one may be there several times."""
        if torch.equal(rows_N, torch.arange(len(self))):
            return
        rows_N = rows_N.to(self.device)
        with torch.inference_mode():
            self._cache.select(rows_N)
        self._new_BT, self._lengths_B = self._new_BT[rows_N], self._lengths_B[rows_N]


def continue_rows(
    rows: TokenRows,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    ends: frozenset[int],
    most: Sequence[int],
) -> list[list[int]]:
    """Draw the tokens of each row, up to one of `ends`, which is left out, or its `most` tokens.

    `generators`: of each row, so that its draws depend on no other row. Ended rows are no longer
    computed.
    """
    found: list[list[int]] = [[] for _ in generators]
    for left, tokens, _ in draw_rows(rows, sampling, generators, ends, most):
        for row, token in zip(left, tokens, strict=True):
            if token not in ends:
                found[row].append(token)
    return found


def draw_rows(
    rows: TokenRows,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    ends: frozenset[int],
    most: Sequence[int],
    repeats: Sequence[int] | None = None,
) -> Iterator[tuple[list[int], list[int], Tensor]]:
    """Draw a token of each row at a time, up to one of `ends` or its `most` tokens.

    Yields the numbers of the rows that are left, their tokens, and the logits (B, V) of these.
    `repeats`: of each row the number of its prompt in `rows`, where several rows continue one.
    """
    left, written = list(range(len(generators))), 0
    while left:
        logits_BV = rows.logits()
        if repeats is not None and not written:
            # A prompt is computed once for all rows that continue it.
            repeats_B = torch.tensor(repeats)
            logits_BV = logits_BV[repeats_B.to(logits_BV.device)]
            rows.select(repeats_B)
        tokens = draw_tokens(logits_BV, sampling, [generators[row] for row in left])
        yield left, tokens, logits_BV
        written += 1
        kept = [
            place
            for place, (row, token) in enumerate(zip(left, tokens, strict=True))
            if token not in ends and written < most[row]
        ]
        left = [left[place] for place in kept]
        if left:
            rows.push(torch.tensor(tokens))
            rows.select(torch.tensor(kept))


def stream_tokens(rows: TokenRows, sampling: Sampling, generator: torch.Generator) -> Iterator[int]:
    """Yield the tokens of a single row while the context has a place for them."""
    while not rows.is_full:
        [token] = draw_tokens(rows.logits(), sampling, [generator])
        rows.push(torch.tensor([token]))
        yield token


def draw_tokens(
    logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> list[int]:
    """Draw a token id a row: top-k, then top-p (nucleus sampling, Holtzman et al. 2020)."""
    if sampling.greedy:
        found: list[int] = logits_BV.argmax(-1).tolist()
        return found
    # On the CPU: a GPU's generator gives other numbers.
    rows = zip(logits_BV.cpu(), generators, strict=True)
    return [_draw_token(logits_V, sampling, generator) for logits_V, generator in rows]


def _draw_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    # The largest becomes 0: divided by a small temperature the others may be -inf, none is NaN.
    logits_V = (logits_V - logits_V.max()) / sampling.temperature
    if 0 < sampling.top_k < logits_V.numel():
        logits_V = logits_V.masked_fill(
            logits_V < logits_V.topk(sampling.top_k).values[-1], -torch.inf
        )
    probability_V = logits_V.softmax(0)
    if sampling.top_p < 1:
        sorted_V, order_V = probability_V.sort(descending=True)
        # A token is kept while the likelier ones do not fill the nucleus.
        outside_V = sorted_V.cumsum(0) - sorted_V >= sampling.top_p
        # One is kept always: a tiny nucleus is 0 in 32 bits.
        outside_V[0] = False
        probability_V = probability_V.index_fill(0, order_V[outside_V], 0.0)
    return int(torch.multinomial(probability_V, 1, generator=generator))
