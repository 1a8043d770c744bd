"""Rows whose keys are in pages attend as each one does alone, whatever is computed next to them."""

import pytest
import torch

from mpillm.errors import UsageError
from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.paged.paged_attention import PagedCache, PagedRow
from mpillm.models.part_module import create
from mpillm.models.stacks.decoder_stack import Decoder

KINDS = {
    "llama": {"kv_heads": 2},
    "gpt2": {"positions": "learned", "norm": "layernorm", "activation": "gelu", "bias": True},
    "window": {"window": 5, "full_every": 2, "kv_heads": 1},
    "gemma2": {
        "window": 6,
        "full_every": 2,
        "attention_soft_cap": 5.0,
        "logits_soft_cap": 9.0,
        "norm_place": "sandwich",
        "kv_heads": 2,
    },
    "gemma3": {"window": 4, "full_every": 2, "window_rope_theta": 100.0, "query_key_norm": True},
    "mixture": {"experts": 4, "experts_per_token": 2},
    "sinusoidal": {"positions": "none"},
}


def model_of(kind: str) -> Decoder:
    config = DecoderConfig(layers=2, width=32, heads=4, context=64, vocab_size=50, **KINDS[kind])
    model = create(config, seed=3).eval()
    assert isinstance(model, Decoder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_steps_give_the_logits_of_each_row_alone(kind: str) -> None:
    model, size = model_of(kind), 4
    draw = torch.Generator().manual_seed(5)
    texts = [torch.randint(0, 50, (n,), generator=draw).tolist() for n in (23, 9, 30, 14)]
    # Pages in no order, and of the first row in order.
    pages = [[0, 1, 2, 3, 4, 5], [19, 7, 23], [9, 8, 21, 11, 10, 22, 12, 20], [13, 17, 15, 14]]
    cache = PagedCache(model.config, range(2), 24, size, torch.device("cpu"))
    # Chunks of each row, step by step: decoding rows are those with one position after others.
    steps = [
        {0: 1, 1: 5},
        {0: 1, 1: 2, 2: 17},
        {0: 1, 1: 1, 2: 6, 3: 13},
        {2: 1, 0: 1, 3: 1, 1: 1},
        {0: 19, 2: 3},
        {2: 1},
        {2: 2},
    ]
    done, found = [0] * 4, [[] for _ in texts]
    with torch.inference_mode():
        for step in steps:
            order = sorted(step, key=lambda n: (step[n] > 1 or not done[n], -done[n]))
            rows = [PagedRow(done[n], step[n], pages[n]) for n in order]
            cache.begin(rows)
            ids = [i for n in order for i in texts[n][done[n] : done[n] + step[n]]]
            logits = model(torch.tensor(ids)[:, None], cache=cache)[:, 0]
            for n, own in zip(order, logits.split([step[n] for n in order]), strict=True):
                found[n].append(own)
                done[n] += step[n]
        for text, parts, length in zip(texts, found, done, strict=True):
            wanted = model(torch.tensor([text[:length]]))[0]
            torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-4, atol=1e-5)


def test_relative_positions_are_refused_by_name() -> None:
    config = DecoderConfig(layers=1, width=8, heads=2, vocab_size=8, positions="relative")
    with pytest.raises(UsageError, match="relative"):
        PagedCache(config, range(1), 2, 4, torch.device("cpu"))
