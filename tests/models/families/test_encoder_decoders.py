"""T5, Marian and Whisper equal transformers on small random models; with caches they generate."""

from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mpillm.models.families.encoder_decoder_family import EncoderDecoderFamily
from mpillm.models.families.family_catalog import FAMILIES, find_family
from mpillm.tasks.cross_entropy import cross_entropy_sum
from tests.models.families.oracle import (
    Adopted,
    adopt,
    check_gradients,
    check_outputs,
    check_state_dict,
    perturb,
    stored,
)
from tests.pretrained import peer

transformers = peer("transformers")

LENGTH, SOURCE, VOCABULARY, MELS, PADDING = 9, 14, 61, 7, 60
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "pad_token_id": PADDING,
    "bos_token_id": None,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "decoder_layers": 3,
    "encoder_layers": 2,
    "dropout": 0.0,
}
T5 = {"d_kv": 12, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 6}
T5 |= {"dropout_rate": 0.0, "n_positions": SOURCE}
BART = {
    f"{stack}_{key}": value
    for stack in ("encoder", "decoder")
    for key, value in (("attention_heads", 4), ("ffn_dim", 48))
}
MARIAN = {**BART, "max_position_embeddings": SOURCE, "forced_eos_token_id": None}
WHISPER = {**BART, "max_source_positions": SOURCE, "max_target_positions": LENGTH}
WHISPER |= {"num_mel_bins": MELS, "begin_suppress_tokens": None}


@dataclass(frozen=True)
class Case:
    kind: str
    changes: dict[str, Any] = field(default_factory=dict, hash=False)


CASES = {
    "t5": Case("t5", T5),
    "t5 1.1": Case(
        "t5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 8}
    ),
    "marian": Case("marian", {**MARIAN, "activation_function": "swish", "scale_embedding": True}),
    "marian, relu": Case("marian", {**MARIAN, "activation_function": "relu"}),
    "whisper": Case("whisper", WHISPER),
}
TEXT = [name for name, case in CASES.items() if case.kind != "whisper"]
CLASSES = {
    "t5": "T5ForConditionalGeneration",
    "marian": "MarianMTModel",
    "whisper": "WhisperForConditionalGeneration",
}


@cache
def theirs(name: str) -> Any:
    """Make transformers' model with random weights, norms and biases too."""
    case = CASES[name]
    config = transformers.AutoConfig.for_model(case.kind, **{**COMMON, **case.changes})
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    model = getattr(transformers, CLASSES[case.kind])(config).float().eval()
    if name == "t5 1.1":
        # transformers ties what the published weights of this form do not.
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 32))
    perturb(model)
    if case.kind == "marian":
        with torch.no_grad():
            model.final_logits_bias.normal_()
    return model


def config_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = theirs(name).config.to_dict()
    # transformers 5 forgets it, and published files have it.
    return {**found, "tie_word_embeddings": False} if name == "t5 1.1" else found


def tensors_of(name: str, gradients: bool = False) -> dict[str, Tensor]:
    """Return the tensors of their model, or their gradients, but constants."""
    ends = find_family(config_of(name)).ignored
    found = stored(theirs(name), gradients)
    return {key: value for key, value in found.items() if not key.endswith(ends)}


@cache
def ours(name: str) -> Adopted:
    return adopt(config_of(name), tensors_of(name))


def fields(padded: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        "source": torch.randint(PADDING, (2, SOURCE), generator=generator),
        "frames": torch.randn(2, 2 * SOURCE, MELS, generator=generator),
        "ids": torch.randint(PADDING, (2, LENGTH + 1), generator=generator)[:, :-1],
        "targets": torch.randint(PADDING, (2, LENGTH), generator=generator),
    }
    return {**found, "source_lengths": torch.tensor([SOURCE, 5])} if padded else found


def their_logits(name: str, given: dict[str, Tensor]) -> Tensor:
    if CASES[name].kind == "whisper":
        source = {"input_features": given["frames"].transpose(1, 2)}
    else:
        source = {"input_ids": given["source"]}
    if "source_lengths" in given:
        source["attention_mask"] = torch.arange(SOURCE) < given["source_lengths"][:, None]
    logits: Tensor = theirs(name)(**source, decoder_input_ids=given["ids"]).logits
    return logits


def loss_of(logits: Tensor, given: dict[str, Tensor]) -> Tensor:
    return cross_entropy_sum(logits, given["targets"]) / given["targets"].numel()


PADDED = [(name, False) for name in CASES] + [(name, True) for name in TEXT]


@pytest.mark.parametrize(("name", "padded"), PADDED)
def test_logits_and_gradients_are_those_of_transformers(name: str, padded: bool) -> None:
    *_, model = ours(name)
    given = fields(padded)
    found, wanted = model(given), their_logits(name, given)
    check_outputs(found, wanted)
    model.zero_grad()
    theirs(name).zero_grad()
    loss_of(found, given).backward()
    loss_of(wanted, given).backward()
    check_gradients(ours(name), tensors_of(name, gradients=True), ("head.bias",))


@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_goes_there_and_back_bitwise(name: str) -> None:
    check_state_dict(ours(name), tensors_of(name))


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_ours_is_their_model(name: str, tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    family, spec, _ = ours(name)
    written = family.config(spec)
    assert family.spec(written) == spec
    ids = {key: COMMON[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = transformers.AutoConfig.for_model(**written, **ids)
    config.save_pretrained(tmp_path)
    tensors = {key: tensors_of(name)[key].clone() for key in family.tensors(spec)}
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = getattr(transformers, written["architectures"][0]).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found = loaded(**their_inputs(name)).logits
        assert torch.allclose(found, theirs(name)(**their_inputs(name)).logits, atol=1e-5)


def their_inputs(name: str) -> dict[str, Tensor]:
    given = fields()
    if CASES[name].kind == "whisper":
        return {
            "input_features": given["frames"].transpose(1, 2),
            "decoder_input_ids": given["ids"],
        }
    return {"input_ids": given["source"], "decoder_input_ids": given["ids"]}


@pytest.mark.parametrize("name", CASES)
def test_cached_decoding_equals_uncached(name: str) -> None:
    *_, model = ours(name)
    given = fields(padded=True)
    with torch.no_grad():
        whole, cache = model(given), model.encode_source(given)
        cuts = (0, 3, 5, *range(6, LENGTH + 1))
        pieces = [
            model.next_logits(given["ids"][:, first:last], cache) for first, last in pairwise(cuts)
        ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TEXT)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    _, spec, model = ours(name)
    source = fields()["source"]
    settings = {"max_new_tokens": LENGTH - 1, "do_sample": False, "num_beams": 1}
    wanted = theirs(name).generate(source, **settings, eos_token_id=None)
    found = [torch.full((2, 1), spec.start_token)]
    with torch.no_grad():
        cache = model.encode_source({"source": source})
        for _ in range(LENGTH - 1):
            found.append(model.next_logits(found[-1], cache).argmax(-1))
    assert torch.equal(torch.cat(found, 1), wanted)


def test_every_family_is_compared() -> None:
    known = {kind for kind in FAMILIES if isinstance(_of(kind), EncoderDecoderFamily)}
    assert {case.kind for case in CASES.values()} == known == set(CLASSES)


@pytest.mark.parametrize("kind", CLASSES)
def test_what_a_file_leaves_out_is_the_default_of_transformers(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind).to_dict()
    if kind == "t5":
        config["decoder_start_token_id"] = config["pad_token_id"]
    assert _of(kind).spec({"model_type": kind}) == _of(kind).spec(config)


def _of(kind: str) -> Any:
    return find_family({"model_type": kind})
