"""What a decoder's settings count for the backward pass is what autograd keeps."""

from typing import Any

import pytest
import torch

from mpillm.models.decoder import DecoderConfig
from mpillm.models.spec import Part, recompute_counts, recompute_of
from tests.models.saved_bytes import check_peak, kept_bytes

GPT2 = {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True}
GEMMA = {"norm": "rmsnorm1p", "activation": "geglu", "scaled_embedding": True, "head_width": 64}
GEMMA2 = {
    **GEMMA,
    "norm_place": "sandwich",
    "attention_soft_cap": 50.0,
    "window": 16,
    "full_every": 2,
}
GEMMA3 = {**GEMMA, "norm_place": "sandwich", "query_key_norm": True, "full_every": 2}
PEAK_KINDS = (
    "llama",
    "gpt2",
    "grouped heads",
    "narrow",
    "dropout",
    "qwen3",
    "gemma2",
    "gemma3",
    "mixture",
)
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": GPT2,
    "grouped heads": {"kv_heads": 2},
    "one head of keys": {"kv_heads": 1, "heads": 8},
    "layernorm and swiglu": {"norm": "layernorm"},
    "rmsnorm and gelu": {"activation": "gelu"},
    "bias": {"bias": True},
    "narrow": {"hidden": 64},
    "dropout": {"dropout": 0.1},
    "dropout of gpt2": {**GPT2, "dropout": 0.1},
    "dropout of attention": {"attention_dropout": 0.1},
    "dropout of attention with groups": {"attention_dropout": 0.1, "kv_heads": 2},
    "long": {"context": 256, "width": 64},
    "wide heads": {"head_width": 64, "kv_heads": 2},
    "qwen3": {"query_key_norm": True, "kv_heads": 2},
    "layernorm of queries": {"query_key_norm": True, "norm": "layernorm"},
    "gemma": GEMMA,
    "half of the features turn": {"rope_share": 0.5},
    "sandwich": {**GEMMA, "norm_place": "sandwich"},
    "window": {"window": 16},
    "narrow window of groups": {"window": 8, "kv_heads": 1},
    "half a window": {"window": 32, "kv_heads": 2},
    "window every other layer": {"window": 16, "full_every": 2},
    "gemma2": GEMMA2,
    "mixture": {"experts": 8, "hidden": 64},
    "balanced mixture": {"experts": 8, "hidden": 64, "balance_loss": 0.1},
    "mixture of many": {"experts": 32, "hidden": 32, "experts_per_token": 5},
    "shared expert": {"experts": 4, "hidden": 96, "shared_hidden": 128, "shared_gate": True},
    "gemma2 with dropout": {**GEMMA2, "dropout": 0.1, "attention_dropout": 0.1},
    "gemma3": {**GEMMA3, "window": 16},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_keeps_what_its_settings_count(kind: str, dtype: torch.dtype) -> None:
    config = DecoderConfig(
        **{"layers": 4, "width": 128, "heads": 4, "context": 64, "vocab_size": 50, **KINDS[kind]}
    )
    for part, rows in ((Part(1, 2), 3), (Part(1, 3), 2)):
        counted = config.activation_bytes(part, rows, dtype.itemsize)
        kept = kept_bytes(config, part, rows, "none", dtype)
        assert counted == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "dropout", "gemma"])
@pytest.mark.parametrize("part", [Part(0, 2), Part(2, 4), Part(0, 4)])
def test_the_ends_of_a_model_keep_what_their_settings_count(kind: str, part: Part) -> None:
    config = DecoderConfig(layers=4, width=128, heads=4, context=64, vocab_size=50, **KINDS[kind])
    kept = kept_bytes(config, part, 3, "none", torch.float32)
    assert config.activation_bytes(part, 3) == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("recompute", ["none", "attention", "full", 2])
@pytest.mark.parametrize("kind", PEAK_KINDS)
def test_the_peak_of_a_step_is_what_is_kept_and_one_block(kind: str, recompute: Any) -> None:
    settings = {"layers": 8, "width": 128, "heads": 4, "context": 128, "vocab_size": 50}
    config = DecoderConfig(**{**settings, **KINDS[kind]})
    kept, whole = check_peak(config, recompute)
    if recompute == "full":
        assert kept < 0.1 * whole


def test_blocks_are_counted_as_they_are_recomputed() -> None:
    for recompute in ("none", "attention", "full", 1, 2, 3, 5):
        for part in (Part(0, 7), Part(2, 5), Part(3, 3), Part(4, 5)):
            kinds = [recompute_of(recompute, block) for block in range(part.first, part.last)]
            counts = recompute_counts(recompute, part)
            assert {kind: n for kind, n in counts.items() if n} == {
                kind: kinds.count(kind) for kind in set(kinds)
            }
