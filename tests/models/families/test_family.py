"""Families without transformers: what is refused, and what follows from settings."""

import subprocess
import sys
from typing import Any

import pytest

from mpillm.errors import RecipeError
from mpillm.models.decoder import SHAPES, DecoderConfig
from mpillm.models.decoder_weights import decoder_weights
from mpillm.models.encoder import SHAPES as ENCODERS
from mpillm.models.families.family_catalog import FAMILIES, family_of, find_family
from mpillm.models.part_module import weight_shapes

LLAMA = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


BERT = {"model_type": "bert"}


def read(**changes: Any) -> DecoderConfig:
    config = {**LLAMA, **changes}
    return find_family(config).spec(config)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True},
        {"kv_heads": 2, "tied": False},
    ],
)
def test_names_and_shapes_are_the_modules(changes: dict[str, Any]) -> None:
    spec = DecoderConfig(layers=2, width=32, heads=4, context=8, vocab_size=20, **changes)
    wanted = {name: shape for name, (_, shape) in weight_shapes(spec).items()}
    assert decoder_weights(spec) == wanted


@pytest.mark.usefixtures("processes")
def test_a_family_needs_no_torch() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from mpillm.models.families.family_catalog import FAMILIES, find_family\n"
        "for kind in FAMILIES:\n"
        "    family = find_family({'model_type': kind})\n"
        "    spec = family.spec({'model_type': kind})\n"
        "    assert len(family.places(spec)) > 100 and family.tensors(spec)\n"
        "    assert family.spec(family.config(spec)) == spec\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", FAMILIES)
def test_their_tensors_hold_each_parameter_once(kind: str) -> None:
    family = find_family({"model_type": kind})
    spec = family.spec({"model_type": kind})
    assert kind in family.model_types
    counted = 0
    for shape in family.tensors(spec).values():
        size = 1
        for each in shape:
            size *= each
        counted += size
    assert counted == spec.parameters


def test_names_of_any_layer() -> None:
    spec = read(num_hidden_layers=12)
    places = find_family(LLAMA).places(spec)
    assert (
        places["layers.11.feed_forward.down.weight"].name == "model.layers.11.mlp.down_proj.weight"
    )
    assert find_family(LLAMA).aliases(spec) == {}
    assert find_family(LLAMA).aliases(spec.replace(tied=True)) == {
        "lm_head.weight": "model.embed_tokens.weight"
    }


def test_an_unsupported_family_names_the_nearest() -> None:
    with pytest.raises(
        RecipeError, match=r"'llama4' is not supported; the nearest is llama \(supp"
    ):
        find_family({"model_type": "llama4"})
    with pytest.raises(RecipeError, match=r"'zamba' is not supported"):
        find_family({"model_type": "zamba"})
    with pytest.raises(RecipeError, match="no model_type that is a text, but None"):
        find_family({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, 'hidden_act = "relu" is not supported; mpillm reads "silu"'),
        ({"hidden_size": "32"}, 'hidden_size = "32" is not supported; mpillm reads a whole number'),
        ({"hidden_size": 0}, "hidden_size = 0 is not supported"),
        ({"num_hidden_layers": 10**9}, "mpillm reads a whole number from 1 to 4096"),
        ({"vocab_size": 2**63}, f"vocab_size = {2**63} is not supported"),
        ({"rope_theta": float("inf")}, "rope_theta = inf is not supported"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan is not supported"),
        ({"rms_norm_eps": None}, "rms_norm_eps = null is not supported"),
        ({"attention_bias": True}, "attention_bias = true is not supported; mpillm reads false"),
        ({"attention_dropout": 2}, "attention_dropout = 2 is not supported"),
        ({"rope_scaling": 3}, "rope_scaling = 3 is not supported"),
        ({"rope_theta": -1}, "rope_theta = -1 is not supported; mpillm reads a number above 0"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            'rope_type = "dynamic" is not supported',
        ),
    ],
)
def test_an_unsupported_value_is_refused_by_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as fault:
        read(**changes)
    assert str(fault.value).startswith("config.json of llama: ")
    assert message in str(fault.value)


def test_rotary_settings_of_transformers_4_and_5() -> None:
    old = read(rope_theta=5e5, rope_scaling=None)
    new = read(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert old == new
    assert old.rope_theta == 5e5


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ("gpt2-124m", "gpt2"),
        ("llama-1b", "llama"),
        ("smollm2-135m", "llama"),
        ("mistral-7b", "mistral"),
        ("mixtral-8x7b", "mixtral"),
        ("qwen2.5-0.5b", "qwen2"),
        ("qwen3-0.6b", "qwen3"),
        ("gemma-2b", "gemma"),
        ("gemma2-2b", "gemma2"),
        ("gemma3-1b", "gemma3_text"),
    ],
)
def test_a_model_of_ours_finds_its_family(shape: str, kind: str) -> None:
    spec = SHAPES[shape]
    family = family_of(spec)
    assert family.model_types == (kind,)
    assert family.spec(family.config(spec)).resolved() == spec.resolved()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("shape", "changes", "kind", "architecture"),
    [
        ("bert-base", {}, "bert", "BertForMaskedLM"),
        (
            "bert-tiny-classes",
            {"classes": 3, "vocab_size": 99},
            "bert",
            "BertForSequenceClassification",
        ),
        ("roberta-base", {}, "roberta", "RobertaForMaskedLM"),
        ("modernbert-base", {}, "modernbert", "ModernBertForMaskedLM"),
        ("vit-base-16", {"classes": 9}, "vit", "ViTForImageClassification"),
        # What has no effect is no reason to be another family.
        ("vit-tiny-digits", {"classes": 9, "vocab_size": 9}, "vit", "ViTForImageClassification"),
    ],
)
def test_an_encoder_of_ours_finds_its_family(
    shape: str, changes: dict[str, Any], kind: str, architecture: str
) -> None:
    spec = ENCODERS[shape].replace(**changes)
    family = family_of(spec)
    assert family.model_types == (kind,)
    assert family.config(spec)["architectures"] == [architecture]


def test_a_head_that_no_class_has_is_named() -> None:
    with pytest.raises(RecipeError, match="head = 'ctc' is none of the family vit, which has seq"):
        family_of(ENCODERS["sound-tiny"])
    with pytest.raises(RecipeError, match="mpillm reads BertForMaskedLM or "):
        find_family(BERT).spec({**BERT, "architectures": ["BertForX"]})


def test_a_masked_lm_s_bias_has_two_names_and_old_norms_others() -> None:
    family = find_family(BERT)
    assert family.aliases(family.spec(BERT)) == {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    assert "bert.embeddings.LayerNorm.gamma" in family.spellings("bert.embeddings.LayerNorm.weight")
    assert "embeddings.LayerNorm.beta" in family.spellings("bert.embeddings.LayerNorm.bias")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position_embedding_type": "relative_key"}, 'mpillm reads "absolute"'),
        ({"is_decoder": True}, "is_decoder = true is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = false is not supported"),
        ({"max_position_embeddings": 0}, "max_position_embeddings = 0 is not supported"),
        ({"architectures": ["BertForQuestionAnswering"], "num_labels": 3}, "2 in a model of spans"),
        ({"architectures": ["BertForTokenClassification"], "id2label": [1]}, "id2label = "),
    ],
)
def test_a_bert_that_is_not_supported(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        find_family(BERT).spec({**BERT, **changes})


def test_a_model_of_no_family_names_what_differs() -> None:
    odd = DecoderConfig(norm="layernorm", vocab_size=50)
    with pytest.raises(RecipeError, match="norm = 'layernorm' is none of the family llama"):
        family_of(odd)


@pytest.mark.parametrize(
    ("types", "wanted"),
    [
        (["full_attention"] * 4, (0, 0)),
        (["sliding_attention"] * 4, (8, 0)),
        (["sliding_attention", "full_attention"] * 2, (8, 2)),
        (["sliding_attention"] * 3 + ["full_attention"], (8, 4)),
        (["full_attention", "sliding_attention"] * 2, (8, 2)),
    ],
)
def test_kinds_of_layers_become_a_rule(types: list[str], wanted: tuple[int, int]) -> None:
    config = {
        **LLAMA,
        "model_type": "qwen3",
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 8,
    }
    spec = find_family(config).spec({**config, "layer_types": types})
    assert (spec.window, spec.full_every) == wanted  # type: ignore[attr-defined]
    irregular = ["full_attention"] * 2 + ["sliding_attention"] * 2
    for wrong in (irregular, types[:2], "sliding"):
        if wrong != types:
            with pytest.raises(RecipeError, match=r"config\.json of qwen3: layer_types = "):
                find_family(config).spec({**config, "layer_types": wrong})


def test_gemma_3_of_transformers_4_and_5() -> None:
    common = {**LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 8}
    old = {
        "rope_theta": 2e6,
        "rope_local_base_freq": 5e3,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 6,
    }
    new = {
        "rope_parameters": {
            "full_attention": {"rope_theta": 2e6, "factor": 8.0, "rope_type": "linear"},
            "sliding_attention": {"rope_theta": 5e3, "rope_type": "default"},
        },
        "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
    }
    specs = [find_family(common).spec({**common, **keys}) for keys in (old, new)]
    assert specs[0] == specs[1]
    assert specs[0].window_rope_theta == 5e3  # type: ignore[attr-defined]
    assert specs[0].full_every == 6  # type: ignore[attr-defined]


JUNK = (None, "x", -1, 0, 0.5, 1e400, float("nan"), [], {}, True, 2**70, [1], {"factor": "y"})


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_value_of_a_file_raises_another_error(kind: str) -> None:
    family, small = find_family({"model_type": kind}), {"model_type": kind}
    keys = {*family.defaults, "layer_types", "rope_scaling", "rope_parameters"}  # type: ignore[attr-defined]
    keys |= {"sliding_window_pattern", "partial_rotary_factor", "n_inner", "num_local_experts"}
    yarn = {"rope_type": "yarn", "factor": 2.0}
    refused = 0
    for key in sorted(keys):
        for junk in JUNK:
            for given in ({key: junk}, {"rope_scaling": {**yarn, key: junk}}):
                try:
                    family.spec({**small, **given})
                except RecipeError:
                    refused += 1
    assert refused > 50
