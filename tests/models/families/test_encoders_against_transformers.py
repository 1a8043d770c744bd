"""Each family of encoders equals transformers on a small random model: outputs, gradients, weights,
settings.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch

from mpillm.models.families.encoder_family import EncoderFamily
from mpillm.models.families.family_catalog import FAMILIES, find_family
from mpillm.models.linear_head import plain_outputs
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

transformers = peer("transformers")
pytest.importorskip("safetensors.torch")

LENGTH, VOCABULARY = 24, 61
LENGTHS = torch.tensor([LENGTH, 7, 15])
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
MODERN = {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2, "num_hidden_layers": 5}
MODERN |= {"bos_token_id": 1, "eos_token_id": 2}
BIASES = {"attention_bias": True, "mlp_bias": True, "classifier_bias": True, "norm_bias": True}
ROBERTA = {"pad_token_id": 1, "max_position_embeddings": LENGTH + 2, "type_vocab_size": 1}
ROBERTA |= {"layer_norm_eps": 1e-5}
IMAGES = {"image_size": 12, "patch_size": 4, "num_channels": 2}
THEIRS_ALONE = ("vocab_size", "max_position_embeddings", "pad_token_id")


@dataclass(frozen=True)
class Case:
    kind: str
    architecture: str
    changes: dict[str, Any] = field(default_factory=dict, hash=False)


CASES = {
    case.architecture + case.changes.pop("name", ""): case
    for case in (
        Case("bert", "BertForMaskedLM"),
        Case("bert", "BertForMaskedLM", {"name": ", tanh", "hidden_act": "gelu_new"}),
        Case("bert", "BertModel"),
        Case("bert", "BertForSequenceClassification", {"num_labels": 5}),
        Case("bert", "BertForTokenClassification", {"num_labels": 4}),
        Case("bert", "BertForQuestionAnswering"),
        Case("roberta", "RobertaForMaskedLM", ROBERTA),
        Case("roberta", "RobertaForSequenceClassification", {**ROBERTA, "num_labels": 3}),
        Case("roberta", "RobertaForTokenClassification", {**ROBERTA, "type_vocab_size": 2}),
        Case("roberta", "RobertaForQuestionAnswering", ROBERTA),
        Case("roberta", "RobertaModel", ROBERTA),
        Case("modernbert", "ModernBertForMaskedLM", MODERN),
        Case("modernbert", "ModernBertForMaskedLM", {"name": ", biases", **MODERN, **BIASES}),
        Case(
            "modernbert",
            "ModernBertForMaskedLM",
            {"name": ", untied", **MODERN, "tie_word_embeddings": False, "decoder_bias": False},
        ),
        Case("modernbert", "ModernBertForSequenceClassification", {**MODERN, "num_labels": 3}),
        Case(
            "modernbert",
            "ModernBertForSequenceClassification",
            {"name": ", mean", **MODERN, "classifier_pooling": "mean", "local_attention": 6},
        ),
        Case("modernbert", "ModernBertForTokenClassification", MODERN),
        Case("modernbert", "ModernBertForQuestionAnswering", MODERN),
        Case("modernbert", "ModernBertModel", {**MODERN, "layer_types": ["full_attention"] * 5}),
        Case("vit", "ViTForImageClassification", {**IMAGES, "num_labels": 7}),
        Case("vit", "ViTForImageClassification", {"name": ", one channel", **IMAGES}),
        Case("vit", "ViTModel", IMAGES),
    )
}
TEXTS = [name for name, case in CASES.items() if case.kind != "vit"]


@cache
def theirs(name: str) -> Any:
    case = CASES[name]
    given = {**COMMON, **case.changes}
    if case.kind == "vit":
        given = {key: value for key, value in given.items() if key not in THEIRS_ALONE}
    config = transformers.AutoConfig.for_model(case.kind, **given)
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    return perturb(getattr(transformers, case.architecture)(config).float().eval())


def config_of(name: str) -> dict[str, Any]:
    # Files name the class; a model in memory need not.
    return {**theirs(name).config.to_dict(), "architectures": [CASES[name].architecture]}


def tensors_of(name: str, gradients: bool = False) -> dict[str, torch.Tensor]:
    return stored(theirs(name), gradients, converts=CASES[name].kind == "vit")


@cache
def ours(name: str) -> Adopted:
    return adopt(config_of(name), tensors_of(name))


def fields_of(name: str, padded: bool) -> dict[str, torch.Tensor]:
    case, generator = CASES[name], torch.Generator().manual_seed(0)
    if case.kind == "vit":
        size = IMAGES["image_size"]
        return {"pixels": torch.randn(3, IMAGES["num_channels"], size, size, generator=generator)}
    # None is the padding's id: RoBERTa numbers no position of it.
    ids = torch.randint(2, VOCABULARY, (3, LENGTH), generator=generator)
    fields = {"ids": ids}
    if padded:
        fields["lengths"] = LENGTHS
    if case.kind != "modernbert":
        fields["token_types"] = (ids > 30).long() % ours(name)[1].token_types
    return fields


def mask_of(fields: dict[str, torch.Tensor]) -> torch.Tensor:
    lengths = fields.get("lengths", torch.full((3,), LENGTH))
    return torch.arange(LENGTH) < lengths[:, None]


def their_outputs(name: str, fields: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    if "pixels" in fields:
        made = theirs(name)(pixel_values=fields["pixels"])
    else:
        more = {"token_type_ids": fields["token_types"]} if "token_types" in fields else {}
        mask = mask_of(fields).long()
        ids = fields["ids"].masked_fill(mask == 0, theirs(name).config.pad_token_id)
        made = theirs(name)(input_ids=ids, attention_mask=mask, **more)
    spans = "start_logits" in made
    return [torch.stack(made.to_tuple(), 1)] if spans else list(made.to_tuple())


def real(outputs: Any, fields: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the outputs of real positions."""
    found = []
    for output in outputs:
        if "ids" in fields and output.dim() == 3:
            positions_first = output if output.shape[1] == LENGTH else output.transpose(1, 2)
            found.append(positions_first[mask_of(fields)])
        else:
            found.append(output)
    return found


def both(name: str, padded: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    fields = fields_of(name, padded)
    outputs = plain_outputs(ours(name)[2].forward_part(fields, ()).outputs)
    wanted = their_outputs(name, fields)
    assert [each.shape for each in outputs] == [each.shape for each in wanted]
    return real(outputs, fields), real(wanted, fields)


PADDINGS = [*((name, False) for name in CASES), *((name, True) for name in TEXTS)]


@pytest.mark.parametrize(("name", "padded"), PADDINGS)
def test_outputs_are_those_of_transformers(name: str, padded: bool) -> None:
    with torch.no_grad():
        for found, wanted in zip(*both(name, padded), strict=True):
            check_outputs(found, wanted)


@pytest.mark.parametrize(("name", "padded"), PADDINGS)
def test_gradients_are_those_of_transformers(name: str, padded: bool) -> None:
    ours(name)[2].zero_grad()
    theirs(name).zero_grad()
    for outputs in both(name, padded):
        # Of random slopes: a sum of squares of normed values has no gradient.
        generator = torch.Generator().manual_seed(4)
        sum((x * torch.randn(x.shape, generator=generator)).mean() for x in outputs).backward()
    check_gradients(ours(name), tensors_of(name, gradients=True))


@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_goes_there_and_back_bitwise(name: str) -> None:
    check_state_dict(ours(name), tensors_of(name))


@pytest.mark.parametrize("name", CASES)
def test_settings_go_there_and_back(name: str) -> None:
    loaded = reloaded(ours(name), theirs(name))
    fields = fields_of(name, False)
    given = (
        {"pixel_values": fields["pixels"]} if "pixels" in fields else {"input_ids": fields["ids"]}
    )
    with torch.no_grad():
        one, other = loaded(**given).to_tuple()[0], theirs(name)(**given).to_tuple()[0]
    assert torch.allclose(one, other, atol=1e-5)


def test_every_family_is_compared() -> None:
    found = {kind: find_family({"model_type": kind}) for kind in FAMILIES}
    families = [family for family in found.values() if isinstance(family, EncoderFamily)]
    known = {name for family in families for name in family.architectures}
    # That one is read as a masked LM alone.
    assert {case.architecture for case in CASES.values()} == known - {"BertForPreTraining"}


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "vit"])
def test_what_a_file_leaves_out_is_the_default_of_transformers(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind).to_dict()
    family = find_family(config)
    assert family.spec({"model_type": kind}) == family.spec(config)
