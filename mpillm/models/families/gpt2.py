"""GPT-2 (Radford et al. 2019): one product for queries, keys and values, stored as (in, out)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.models.decoder import DecoderConfig
from mpillm.models.families.family import Cut, DecoderFamily, Place
from mpillm.models.families.hub_config import MOST_LAYERS, HubConfig
from mpillm.models.spec import ModelSpec

PARTS = ("query", "key", "value")
ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu-exact"}
)


class GPT2(DecoderFamily):
    """Pre-norm blocks with LayerNorm, learned positions, GELU, and biases everywhere."""

    model_types = ("gpt2",)
    architecture = "GPT2LMHeadModel"
    prefix = "transformer."
    ignored = ("attn.bias", "attn.masked_bias")
    block = "transformer.h."
    names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "embedding.weight": "transformer.wte.weight",
            "position.weight": "transformer.wpe.weight",
            "norm.weight": "transformer.ln_f.weight",
            "norm.bias": "transformer.ln_f.bias",
            "head.weight": "lm_head.weight",
            "attention_norm": "ln_1",
            "attention.query": "attn.c_attn",
            "attention.key": "attn.c_attn",
            "attention.value": "attn.c_attn",
            "attention.output": "attn.c_proj",
            "forward_norm": "ln_2",
            "feed_forward.up": "mlp.c_fc",
            "feed_forward.down": "mlp.c_proj",
        }
    )
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "activation_function": "gelu_new",
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        }
    )

    def settings(self, hub: HubConfig) -> dict[str, Any]:
        hub.require("scale_attn_weights", True)
        hub.require("scale_attn_by_inverse_layer_idx", False)
        hub.require("add_cross_attention", False)
        width = hub.integer("n_embd")
        inner = 4 * width if hub.value("n_inner") is None else hub.integer("n_inner")
        return {
            "layers": hub.integer("n_layer", most=MOST_LAYERS),
            "width": width,
            "heads": hub.integer("n_head"),
            "hidden": 0 if inner == 4 * width else inner,
            "context": hub.integer("n_positions"),
            "vocab_size": hub.integer("vocab_size"),
            "norm": "layernorm",
            "positions": "learned",
            "activation": ACTIVATIONS[hub.require("activation_function", *ACTIVATIONS)],
            "bias": True,
            "tied": hub.require("tie_word_embeddings", False, True),
            "norm_epsilon": hub.number("layer_norm_epsilon"),
            "dropout": hub.share("resid_pdrop"),
            "attention_dropout": hub.share("attn_pdrop"),
            "embedding_dropout": hub.share("embd_pdrop"),
        }

    def keys(self, spec: DecoderConfig) -> dict[str, Any]:
        return {
            "vocab_size": spec.vocab_size,
            "n_positions": spec.context,
            "n_embd": spec.width,
            "n_layer": spec.layers,
            "n_head": spec.heads,
            "n_inner": spec.hidden or None,
            "activation_function": "gelu" if spec.activation == "gelu-exact" else "gelu_new",
            "resid_pdrop": spec.dropout,
            "embd_pdrop": spec.embedding_dropout,
            "attn_pdrop": spec.attention_dropout,
            "layer_norm_epsilon": spec.norm_epsilon,
            "tie_word_embeddings": spec.tied,
        }

    def place(self, spec: ModelSpec, name: str) -> Place:
        assert isinstance(spec, DecoderConfig)
        module, _, kind = name.rpartition(".")
        # Conv1D, a product with (in, out): all but norms and embeddings.
        product = ".attention." in name or ".feed_forward." in name
        box: Cut | None = None
        if (part := module.rpartition(".")[2]) in PARTS:
            first = PARTS.index(part) * spec.width
            box = (first,), (spec.width,)
            if kind == "weight":
                box = (0, first), (spec.width, spec.width)
        return Place(self.renamed(name), box, product and kind == "weight")
