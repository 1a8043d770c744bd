"""Sample several answers to each prompt, with the probability of each token that is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpillm.infer.decoding.prompts import Int64s, Questions
from mpillm.infer.decoding.token_rows import TokenRows, draw_rows
from mpillm.infer.sampling import Sampling
from mpillm.models.part_module import PartModule
from mpillm.tokens.order import task_keys


@dataclass(frozen=True)
class SampledAnswer:
    """An answer as it was drawn: with the token that ends it, unless it was cut off."""

    prompt: list[int]
    ids: list[int]
    log_probs: list[float]
    """Of each token, by the softmax of logits / temperature, from which it was drawn."""
    ended: bool
    """Whether the model ended it itself."""


def sample_answers(
    model: PartModule,
    questions: Questions,
    numbers_B: Int64s,
    samples_B: Int64s,
    sampling: Sampling,
) -> list[SampledAnswer]:
    """Sample an answer to each of the questions `numbers_B`, computed together.

    A question may be there several times: its prompt is computed once. `samples_B`: the number of
    each answer in the run, which with the seed decides its draws. Raises CheckpointError where
    outputs are not finite, DataError for odd data.
    """
    unique, repeats_B = np.unique(numbers_B, return_inverse=True)
    prompts = questions.prompts(unique).ids
    generators = [
        torch.Generator().manual_seed(key & ((1 << 63) - 1))
        for key in task_keys(sampling.seed, samples_B).tolist()
    ]
    rows, most = TokenRows(model, prompts), [questions.max_tokens] * len(numbers_B)
    ids: list[list[int]] = [[] for _ in generators]
    log_probs: list[list[float]] = [[] for _ in generators]
    given = rows, sampling, generators, questions.ends, most, repeats_B.tolist()
    for left, tokens, logits_BV in draw_rows(*given):
        for row, token, log in zip(left, tokens, _drawn(logits_BV, tokens, sampling), strict=True):
            ids[row].append(token)
            log_probs[row].append(log)
    return [
        SampledAnswer(prompts[prompt], own, logs, own[-1] in questions.ends)
        for prompt, own, logs in zip(repeats_B.tolist(), ids, log_probs, strict=True)
    ]


def _drawn(logits_BV: torch.Tensor, tokens: Sequence[int], sampling: Sampling) -> list[float]:
    """Return the log-probability of each row's token."""
    logs_BV = (logits_BV / sampling.temperature).log_softmax(-1)
    tokens_B1 = torch.tensor(tokens, device=logs_BV.device)[:, None]
    found: list[float] = logs_BV.gather(1, tokens_B1)[:, 0].tolist()
    return found
