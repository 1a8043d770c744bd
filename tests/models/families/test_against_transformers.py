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
from mpillm.models.part_module import create
from mpillm.tasks.cross_entropy import cross_entropy_sum
from tests.models.families.oracle import perturb, read, stored
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
def ours(name: str) -> Any:
    """Make our model of their settings, with their weights."""
    config = theirs(name).config.to_dict()
    family = find_family(config)
    spec = family.spec(config)
    model = create(spec, 1)
    tensors, places = their_tensors(theirs(name)), family.places(spec)
    assert set(places) == set(dict(model.named_parameters()))
    with torch.no_grad():
        for ours_name, weight in model.named_parameters():
            weight.copy_(read(tensors, places[ours_name]))
    return family, spec, model


def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return cross_entropy_sum(logits[:, :-1], ids()[:, 1:]) / ids()[:, 1:].numel()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str) -> None:
    *_, model = ours(name)
    with torch.no_grad():
        found, wanted = model(ids()), theirs(name)(ids()).logits
    assert (found - wanted).abs().max() <= 1e-4
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_transformers(name: str) -> None:
    family, spec, model = ours(name)
    their_model = theirs(name)
    their_model.zero_grad()
    loss_of(their_model(ids()).logits).backward()
    model.zero_grad()
    loss_of(model(ids())).backward()
    gradients = their_tensors(their_model, gradients=True)
    places = family.places(spec)
    for ours_name, weight in model.named_parameters():
        wanted = read(gradients, places[ours_name])
        assert (weight.grad - wanted).abs().max() <= 1e-4, ours_name
        assert (weight.grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-7, ours_name


@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_goes_there_and_back_bitwise(name: str) -> None:
    family, spec, model = ours(name)
    shapes, aliases = family.tensors(spec), family.aliases(spec)
    back = {key: torch.full(shape, torch.nan) for key, shape in shapes.items()}
    with torch.no_grad():
        for ours_name, place in family.places(spec).items():
            read(back, place).copy_(model.get_parameter(ours_name))
    wanted = their_tensors(theirs(name))
    assert set(wanted) == set(back) | set(aliases)
    assert all(torch.equal(wanted[key], tensor) for key, tensor in back.items())
    assert all(torch.equal(wanted[key], back[leader]) for key, leader in aliases.items())


@pytest.mark.parametrize("name", CASES)
def test_settings_go_there_and_back(name: str) -> None:
    family, spec, _ = ours(name)
    written = family.config(spec)
    assert family.spec(written) == spec
    config = transformers.AutoConfig.for_model(**written)
    # Short files leave out the defaults of their family.
    assert family.spec({"model_type": written["model_type"], **config.to_diff_dict()}) == spec
    loaded = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert type(loaded).__name__ == written["architectures"][0]
    loaded.load_state_dict(theirs(name).state_dict())
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
