"""ModernBERT (Warner et al. 2024)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.models.encoder import EncoderConfig
from mpillm.models.encoder_settings import Head
from mpillm.models.families.encoder_family import EncoderFamily, name_of
from mpillm.models.families.family import Place
from mpillm.models.families.hub_config import MOST_LAYERS, HubConfig
from mpillm.models.families.window_keys import layer_types, read_windows
from mpillm.models.spec import ModelSpec

ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {"gelu": "geglu-exact", "gelu_new": "geglu", "gelu_pytorch_tanh": "geglu"}
)
POOLINGS: Mapping[str, str] = MappingProxyType({"cls": "first", "mean": "mean"})
# Tensors of theirs that hold several of ours, one below the other.
FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attn.Wqkv": ("attention.query", "attention.key", "attention.value"),
        "mlp.Wi": ("feed_forward.gate", "feed_forward.up"),
    }
)
# The id that a file without `pad_token_id` means.
PADDING = 50283
CLASSIFIER: Mapping[str, str] = MappingProxyType(
    {"head_dense": "head.dense", "head_norm": "head.norm", "head": "classifier"}
)


class ModernBert(EncoderFamily):
    """Pre-norm blocks with GeGLU, rotary positions, and a window in two layers of three."""

    model_types = ("modernbert",)
    names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "embedding.weight": "model.embeddings.tok_embeddings.weight",
            "embedding_norm.weight": "model.embeddings.norm.weight",
            "embedding_norm.bias": "model.embeddings.norm.bias",
            "norm.weight": "model.final_norm.weight",
            "norm.bias": "model.final_norm.bias",
            "attention_norm": "attn_norm",
            "attention.output": "attn.Wo",
            "forward_norm": "mlp_norm",
            "feed_forward.down": "mlp.Wo",
            **{ours: theirs for theirs, parts in FUSED.items() for ours in parts},
        }
    )
    architectures: ClassVar[Mapping[str, Head]] = MappingProxyType(
        {
            "ModernBertForMaskedLM": "lm",
            "ModernBertForSequenceClassification": "sequence",
            "ModernBertForTokenClassification": "token",
            "ModernBertForQuestionAnswering": "span",
            "ModernBertModel": "none",
        }
    )
    heads: ClassVar[Mapping[Head, Mapping[str, str]]] = MappingProxyType(
        {
            "lm": {**CLASSIFIER, "head": "decoder"},
            "sequence": CLASSIFIER,
            "token": CLASSIFIER,
            "span": CLASSIFIER,
            "none": {},
        }
    )
    head_layers: ClassVar[Mapping[str, str]] = MappingProxyType(
        dict.fromkeys(("lm", "sequence", "token", "span"), "norm")
    )
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "vocab_size": 50368,
            "hidden_size": 768,
            "intermediate_size": 1152,
            "num_hidden_layers": 22,
            "num_attention_heads": 12,
            "hidden_activation": "gelu",
            "max_position_embeddings": 8192,
            "norm_eps": 1e-5,
            "norm_bias": False,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "global_attn_every_n_layers": 3,
            "local_attention": 128,
            "global_rope_theta": 160000.0,
            "local_rope_theta": 10000.0,
            "embedding_dropout": 0.0,
            "mlp_bias": False,
            "mlp_dropout": 0.0,
            "decoder_bias": True,
            "classifier_pooling": "cls",
            "classifier_dropout": 0.0,
            "classifier_bias": False,
            "classifier_activation": "gelu",
            "tie_word_embeddings": True,
            "num_labels": 2,
            "architectures": None,
            "id2label": None,
        }
    )

    def settings(self, hub: HubConfig, head: Head) -> dict[str, Any]:
        bias = hub.require("attention_bias", False, True)
        hub.require("mlp_bias", bias)
        hub.require("classifier_bias", bias)
        activation = hub.require("hidden_activation", *ACTIVATIONS)
        alike = [name for name, ours in ACTIVATIONS.items() if ours == ACTIVATIONS[activation]]
        hub.require("classifier_activation", *alike)
        pooling = POOLINGS[hub.require("classifier_pooling", *POOLINGS)]
        head_bias = hub.require("decoder_bias", False, True)
        tied = hub.require("tie_word_embeddings", False, True)
        every = hub.integer("global_attn_every_n_layers")
        windows = read_windows(hub, every, hub.integer("local_attention"), 1)
        local = _theta(hub, "sliding_attention", "local_rope_theta")
        return {
            "layers": hub.integer("num_hidden_layers", most=MOST_LAYERS),
            "width": hub.integer("hidden_size"),
            "heads": hub.integer("num_attention_heads"),
            "hidden": hub.integer("intermediate_size"),
            "context": hub.integer("max_position_embeddings"),
            "vocab_size": hub.integer("vocab_size"),
            "norm": "layernorm" if hub.require("norm_bias", False, True) else "layernorm-nobias",
            "norm_place": "pre",
            "first_norm": False,
            "positions": "rotary",
            "activation": ACTIVATIONS[activation],
            "bias": bias,
            "norm_epsilon": hub.number("norm_eps"),
            "rope_theta": _theta(hub, "full_attention", "global_rope_theta"),
            **windows,
            "window_rope_theta": local if windows["window"] else 0.0,
            "pooling": pooling if head == "sequence" else "first",
            "head_bias": head_bias if head == "lm" else True,
            "tied": tied if head == "lm" else True,
            "dropout": hub.share("mlp_dropout"),
            "attention_dropout": hub.share("attention_dropout"),
            "embedding_dropout": hub.share("embedding_dropout"),
            "head_dropout": hub.share("classifier_dropout"),
        }

    def keys(self, spec: EncoderConfig) -> dict[str, Any]:
        activation = name_of(ACTIVATIONS, spec.activation)
        local = spec.window_rope_theta or spec.rope_theta
        # transformers builds no model whose padding is not in its vocabulary.
        padding = {"pad_token_id": None} if spec.vocab_size <= PADDING else {}
        return {
            **padding,
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.width,
            "intermediate_size": spec.hidden_width,
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.heads,
            "hidden_activation": activation,
            "classifier_activation": activation,
            "max_position_embeddings": spec.context,
            "norm_eps": spec.norm_epsilon,
            "norm_bias": spec.norm == "layernorm",
            "attention_bias": spec.bias,
            "mlp_bias": spec.bias,
            "classifier_bias": spec.bias,
            "decoder_bias": spec.head_bias,
            "classifier_pooling": name_of(POOLINGS, spec.pooling),
            "mlp_dropout": spec.dropout,
            "attention_dropout": spec.attention_dropout,
            "embedding_dropout": spec.embedding_dropout,
            "classifier_dropout": spec.head_dropout,
            "tie_word_embeddings": spec.tied,
            # transformers 4 reads every n-th layer, and 5 their kinds.
            **({"local_attention": spec.window} if spec.window else {}),
            "global_attn_every_n_layers": (spec.full_every or spec.layers) if spec.window else 1,
            "layer_types": layer_types(spec),
            "global_rope_theta": spec.rope_theta,
            "local_rope_theta": local,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": spec.rope_theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            },
        }

    def place(self, spec: ModelSpec, name: str) -> Place:
        found = super().place(spec, name)
        module, _, kind = name.rpartition(".")
        within = module.partition(".")[2].partition(".")[2]
        for parts in FUSED.values():
            if within in parts:
                assert isinstance(spec, EncoderConfig)
                rows = self.shapes(spec)[name][0]
                first = parts.index(within) * rows
                box = ((first, 0), (rows, spec.width)) if kind == "weight" else ((first,), (rows,))
                return Place(found.name, box)
        return found


def _theta(hub: HubConfig, kind: str, key: str) -> float:
    """Return the base of the angles in layers of `kind`, which are not scaled."""
    rope = hub.rope(kind, key)
    if rope["rope_type"] != "default":
        raise hub.fault(f"rope_type of {kind}", rope["rope_type"], '"default"')
    return float(rope["rope_theta"])
