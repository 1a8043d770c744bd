"""Each family of decoders equals transformers on a small random model: logits, gradients, weights,
settings.
"""

from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpillm.models.families.family import DecoderFamily
from mpillm.models.families.family_catalog import FAMILIES, find_family
from mpillm.tasks.cross_entropy import cross_entropy_sum
from tests.models.families.oracle import (
    Adopted,
    adopt,
    check_gradients,
    check_outputs,
    check_state_dict,
    perturb,
    reloaded,
    stored,
)
from tests.pretrained import peer

if MPI.COMM_WORLD.size > 1:
    # Before the library is imported, which takes seconds on each rank.
    pytest.skip("no messages: serial pass only", allow_module_level=True)
transformers = peer("transformers")
pytest.importorskip("safetensors.torch")

LENGTH, VOCABULARY = 24, 61
DECODERS = [
    kind for kind in FAMILIES if isinstance(find_family({"model_type": kind}), DecoderFamily)
]
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}
LINEAR = {"rope_type": "linear", "factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
MIXTURE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA = {"head_dim": 16, "sliding_window": 5}
GPT2 = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": LENGTH,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


@dataclass(frozen=True)
class Case:
    kind: str
    changes: dict[str, Any] = field(default_factory=dict, hash=False)


CASES = {
    "llama": Case("llama"),
    "llama with biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with a tied head": Case("llama", {"tie_word_embeddings": True, "rope_theta": 5e5}),
    "llama 3": Case("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama, linear": Case("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "llama, yarn": Case("llama", {"rope_scaling": YARN, "head_dim": 16}),
    "mistral": Case("mistral", {"sliding_window": 7}),
    "mistral without a window": Case("mistral", {"sliding_window": None}),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows": Case("qwen2", WINDOWS),
    "qwen3": Case("qwen3", {"head_dim": 16}),
    "qwen3 with windows": Case("qwen3", {**WINDOWS, "head_dim": 8}),
    "mixtral": Case("mixtral", {"num_local_experts": 5}),
    "mixtral with a window": Case("mixtral", {"sliding_window": 5, "num_experts_per_tok": 3}),
    "qwen2_moe": Case("qwen2_moe", {**MIXTURE, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": Case("qwen3_moe", {**MIXTURE, "norm_topk_prob": True, "head_dim": 16}),
    "gemma": Case("gemma", {"head_dim": 16}),
    "gemma2": Case("gemma2", {**GEMMA, "query_pre_attn_scalar": 24}),
    "gemma2, other caps": Case("gemma2", {**GEMMA, "final_logit_softcapping": 2.0}),
    "gemma3": Case("gemma3_text", {**GEMMA, "num_hidden_layers": 7}),
    "gemma3, linear": Case("gemma3_text", {**GEMMA, "rope_scaling": LINEAR}),
    "gpt2": Case("gpt2", GPT2),
    "gpt2, exact": Case("gpt2", {**GPT2, "activation_function": "gelu", "n_inner": 80}),
}


@cache
def theirs(name: str) -> Any:
    """Make transformers' model with random weights, norms and biases too."""
    case = CASES[name]
    config = transformers.AutoConfig.for_model(case.kind, **{**COMMON, **case.changes})
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    return perturb(transformers.AutoModelForCausalLM.from_config(config).float().eval())


def their_tensors(model: Any, gradients: bool = False) -> dict[str, torch.Tensor]:
    return stored(model, gradients, converts=hasattr(model.config, "num_experts_per_tok"))


@cache
def ours(name: str) -> Adopted:
    return adopt(theirs(name).config.to_dict(), their_tensors(theirs(name)))


def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return cross_entropy_sum(logits[:, :-1], ids()[:, 1:]) / ids()[:, 1:].numel()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str) -> None:
    *_, model = ours(name)
    with torch.no_grad():
        found, wanted = model(ids()), theirs(name)(ids()).logits
    check_outputs(found, wanted)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_transformers(name: str) -> None:
    *_, model = ours(name)
    their_model = theirs(name)
    their_model.zero_grad()
    loss_of(their_model(ids()).logits).backward()
    model.zero_grad()
    loss_of(model(ids())).backward()
    check_gradients(ours(name), their_tensors(their_model, gradients=True))


@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_goes_there_and_back_bitwise(name: str) -> None:
    check_state_dict(ours(name), their_tensors(theirs(name)))


@pytest.mark.parametrize("name", CASES)
def test_settings_go_there_and_back(name: str) -> None:
    loaded = reloaded(ours(name), theirs(name))
    with torch.no_grad():
        assert torch.allclose(loaded(ids()).logits, theirs(name)(ids()).logits, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_cached_decoding_equals_uncached(name: str) -> None:
    *_, model = ours(name)
    with torch.no_grad():
        whole, cache = model(ids()), model.make_cache(2)
        cuts = (0, 5, 9, *range(10, LENGTH + 1))
        pieces = [model.next_logits(ids()[:, first:last], cache) for first, last in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


def test_every_family_is_compared() -> None:
    assert {case.kind for case in CASES.values()} == set(DECODERS)


@pytest.mark.parametrize("kind", DECODERS)
def test_what_a_file_leaves_out_is_the_default_of_transformers(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind).to_dict()
    family = find_family(config)
    assert family.spec({"model_type": kind}) == family.spec(config)
