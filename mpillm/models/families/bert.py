"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.models.encoder import EncoderConfig
from mpillm.models.encoder_settings import Head
from mpillm.models.families.encoder_family import EncoderFamily, name_of
from mpillm.models.families.hub_config import MOST_LAYERS, HubConfig
from mpillm.models.spec import ModelSpec

BLOCK_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "attention.query": "attention.self.query",
        "attention.key": "attention.self.key",
        "attention.value": "attention.self.value",
        "attention.output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "feed_forward.up": "intermediate.dense",
        "feed_forward.down": "output.dense",
        "forward_norm": "output.LayerNorm",
    }
)
EMBEDDINGS: Mapping[str, str] = MappingProxyType(
    {
        "embedding.weight": "embeddings.word_embeddings.weight",
        "position.weight": "embeddings.position_embeddings.weight",
        "token_type.weight": "embeddings.token_type_embeddings.weight",
        "embedding_norm.weight": "embeddings.LayerNorm.weight",
        "embedding_norm.bias": "embeddings.LayerNorm.bias",
    }
)
ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {"gelu": "gelu-exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
)
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "num_labels": 2,
        "architectures": None,
        "id2label": None,
    }
)
# Of BERT before transformers: its norms had these names.
OLD_NORMS = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))


class Bert(EncoderFamily):
    """Post-norm blocks with LayerNorm, learned positions, token types, and biases everywhere."""

    model_types: ClassVar[tuple[str, ...]] = ("bert",)
    prefix = "bert."
    ignored = (
        "position_ids",
        # Of next sentences, which a file of a masked LM may have, too.
        "pooler.dense.weight",
        "pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    )
    block = "bert.encoder.layer."
    names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {**BLOCK_NAMES, **{ours: f"bert.{theirs}" for ours, theirs in EMBEDDINGS.items()}}
    )
    architectures: ClassVar[Mapping[str, Head]] = MappingProxyType(
        {
            "BertForMaskedLM": "lm",
            "BertForPreTraining": "lm",
            "BertForSequenceClassification": "sequence",
            "BertForTokenClassification": "token",
            "BertForQuestionAnswering": "span",
            "BertModel": "none",
        }
    )
    heads: ClassVar[Mapping[Head, Mapping[str, str]]] = MappingProxyType(
        {
            "lm": {
                "head_dense": "cls.predictions.transform.dense",
                "head_norm": "cls.predictions.transform.LayerNorm",
                "head": "cls.predictions.decoder",
                "head.bias": "cls.predictions.bias",
            },
            "sequence": {"head_dense": "bert.pooler.dense", "head": "classifier"},
            "token": {"head": "classifier"},
            "span": {"head": "qa_outputs"},
            "none": {"head_dense": "pooler.dense"},
        }
    )
    head_layers: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"lm": "norm", "sequence": "tanh", "none": "tanh"}
    )
    second_bias: ClassVar[str] = "cls.predictions.decoder.bias"
    """A second name of the bias of a masked LM's head."""
    activations: ClassVar[Mapping[str, str]] = ACTIVATIONS
    defaults: ClassVar[Mapping[str, Any]] = DEFAULTS

    def settings(self, hub: HubConfig, head: Head) -> dict[str, Any]:
        hub.require("position_embedding_type", "absolute")
        hub.require("is_decoder", False)
        hub.require("add_cross_attention", False)
        if head == "lm":
            hub.require("tie_word_embeddings", True)
        dropped = head in ("sequence", "token", "span")
        own = hub.value("classifier_dropout") is not None and head != "span"
        offset = self.offset(hub)
        rows = hub.integer("max_position_embeddings", offset + 1)
        return {
            "layers": hub.integer("num_hidden_layers", most=MOST_LAYERS),
            "width": hub.integer("hidden_size"),
            "heads": hub.integer("num_attention_heads"),
            "hidden": hub.integer("intermediate_size"),
            "context": rows - offset,
            "position_offset": offset,
            "vocab_size": hub.integer("vocab_size"),
            "token_types": hub.integer("type_vocab_size"),
            "activation": self.activations[hub.require("hidden_act", *self.activations)],
            "norm_epsilon": hub.number("layer_norm_eps"),
            "dropout": hub.share("hidden_dropout_prob"),
            "embedding_dropout": hub.share("hidden_dropout_prob"),
            "attention_dropout": hub.share("attention_probs_dropout_prob"),
            "head_dropout": hub.share("classifier_dropout" if own else "hidden_dropout_prob")
            if dropped
            else 0.0,
        }

    def offset(self, hub: HubConfig) -> int:
        """Return the row of the first position in the table of positions."""
        return 0

    def keys(self, spec: EncoderConfig) -> dict[str, Any]:
        return {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.width,
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.heads,
            "intermediate_size": spec.hidden_width,
            "hidden_act": name_of(self.activations, spec.activation),
            "hidden_dropout_prob": spec.dropout,
            "attention_probs_dropout_prob": spec.attention_dropout,
            "max_position_embeddings": spec.context + spec.position_offset,
            "type_vocab_size": spec.token_types,
            "layer_norm_eps": spec.norm_epsilon,
            "position_embedding_type": "absolute",
            "tie_word_embeddings": spec.tied,
        }

    def aliases(self, spec: ModelSpec) -> Mapping[str, str]:
        found = dict(super().aliases(spec))
        if found:
            found[self.second_bias] = self.place(spec, "head.bias").name
        return found

    def spellings(self, name: str) -> tuple[str, ...]:
        found = super().spellings(name)
        old = [
            each.replace(new, old) for each in found for new, old in OLD_NORMS if each.endswith(new)
        ]
        return *found, *old


class Roberta(Bert):
    """BERT with other heads, whose positions are counted from the padding's id + 1 on."""

    model_types: ClassVar[tuple[str, ...]] = ("roberta",)
    prefix = "roberta."
    block = "roberta.encoder.layer."
    names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {**BLOCK_NAMES, **{ours: f"roberta.{theirs}" for ours, theirs in EMBEDDINGS.items()}}
    )
    architectures: ClassVar[Mapping[str, Head]] = MappingProxyType(
        {
            "RobertaForMaskedLM": "lm",
            "RobertaForSequenceClassification": "sequence",
            "RobertaForTokenClassification": "token",
            "RobertaForQuestionAnswering": "span",
            "RobertaModel": "none",
        }
    )
    heads: ClassVar[Mapping[Head, Mapping[str, str]]] = MappingProxyType(
        {
            "lm": {
                "head_dense": "lm_head.dense",
                "head_norm": "lm_head.layer_norm",
                "head": "lm_head.decoder",
                "head.bias": "lm_head.bias",
            },
            "sequence": {"head_dense": "classifier.dense", "head": "classifier.out_proj"},
            "token": {"head": "classifier"},
            "span": {"head": "qa_outputs"},
            "none": {"head_dense": "pooler.dense"},
        }
    )
    second_bias: ClassVar[str] = "lm_head.decoder.bias"
    # Its head has the exact GELU, whatever that of the blocks is.
    activations: ClassVar[Mapping[str, str]] = MappingProxyType({"gelu": "gelu-exact"})
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {**DEFAULTS, "vocab_size": 50265, "pad_token_id": 1}
    )

    def offset(self, hub: HubConfig) -> int:
        return hub.integer("pad_token_id", 0, 1 << 16) + 1

    def keys(self, spec: EncoderConfig) -> dict[str, Any]:
        return {**super().keys(spec), "pad_token_id": max(spec.position_offset - 1, 0)}
