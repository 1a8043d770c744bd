"""Rows that are continued together, compared with each one alone; draws of tokens."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from mpillm.errors import CheckpointError
from mpillm.infer.decoding.token_rows import TokenRows, continue_rows, draw_tokens
from mpillm.infer.sampling import Sampling
from mpillm.models.decoder import DecoderConfig
from mpillm.models.part_module import PartModule, create

TINY = DecoderConfig(layers=2, width=16, heads=2, kv_heads=1, hidden=32, context=40, vocab_size=23)
KINDS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "learned": {"positions": "learned", "norm": "layernorm", "activation": "gelu"},
    "windows": {"window": 5, "full_every": 2},
    "soft cap": {"attention_soft_cap": 2.0, "window": 6},
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8], [9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4]]


def decoder(kind: str) -> PartModule:
    """Make a small model whose weights choose between tokens."""
    model = create(TINY.replace(**KINDS[kind]), 5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(8)
    return model.eval()


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in range(count)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unequal_rows_have_the_tokens_that_each_has_alone(kind: str, temperature: float) -> None:
    model, sampling = decoder(kind), Sampling(temperature=temperature)
    most, ends = [20, 29, 7, 29], frozenset({1})
    found = continue_rows(TokenRows(model, PROMPTS), sampling, generators(4), ends, most)
    for row, prompt in enumerate(PROMPTS):
        rows, own = TokenRows(model, [prompt]), generators(4)[row : row + 1]
        assert [found[row]] == continue_rows(rows, sampling, own, ends, most[row : row + 1])
    assert not any(1 in tokens for tokens in found)
    assert 0 < len(found[2]) <= 7
    # Rows end at different times, so that the others go on without them.
    assert len(set(map(len, found))) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_rows_are_those_without_a_cache(kind: str) -> None:
    model = decoder(kind)
    found = continue_rows(
        TokenRows(model, PROMPTS), Sampling(temperature=0), generators(4), frozenset(), [9] * 4
    )
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        ids = list(prompt)
        for _ in range(9):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert prompt + tokens == ids


def test_draws_follow_temperature_top_k_and_top_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def seen(**settings: float) -> Counter[int]:
        chosen: dict[str, Any] = {"temperature": 1.0, "top_k": 0, **settings}
        rows = logits.expand(2000, 4)
        return Counter(draw_tokens(rows, Sampling(**chosen), [generator] * 2000))

    assert set(seen(temperature=0.0)) == {0}
    assert set(seen(top_k=2)) == {0, 1}
    assert set(seen(top_p=0.6)) == {0, 1}
    assert set(seen(top_p=0.01)) == {0}
    full = seen()
    assert [full[token] / 2000 for token in range(4)] == pytest.approx(
        [0.5, 0.3, 0.15, 0.05], abs=0.05
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-40},
        {"temperature": 1e-6},
        {"temperature": 1e6},
        {"top_p": 1e-300},
        {"top_k": 10**12},
        {"seed": (1 << 63) - 1},
    ],
)
def test_extreme_settings_draw_a_token(settings: dict[str, Any]) -> None:
    logits = torch.tensor([[1e4, -1e4, 9e3, -torch.finfo().max]])
    sampling = Sampling(**settings)
    [token] = draw_tokens(logits, sampling, [torch.Generator().manual_seed(sampling.seed)])
    assert token == 0 or settings == {"temperature": 1e6}


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_outputs_that_are_no_numbers_are_said(odd: float) -> None:
    model = decoder("rotary")
    with torch.no_grad():
        next(model.parameters())[5] = odd
    with pytest.raises(CheckpointError, match=r"NaN or infinite.*an earlier checkpoint"):
        TokenRows(model, PROMPTS).logits()
