"""Llama 1 to 3 (Touvron et al. 2023; Llama 3: Grattafiori et al. 2024), and models of its form."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.models.decoder import DecoderConfig
from mpillm.models.families.family import DecoderFamily
from mpillm.models.families.hub_config import MOST_LAYERS, HubConfig
from mpillm.models.families.rope_keys import read_rope, rope_keys

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "forward_norm": "post_attention_layernorm",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
    }
)


class LlamaLike(DecoderFamily):
    """The families whose blocks have Llama's names: what their settings have in common."""

    names: ClassVar[Mapping[str, str]] = NAMES
    activations: ClassVar[Mapping[str, str]] = MappingProxyType({"silu": "swiglu"})
    """Their names of the activations that the family may have → ours, the usual one first."""
    activation_key: ClassVar[str] = "hidden_act"
    shares_width: ClassVar[bool] = False
    """Whether heads share the width, without a key of their own: another width of a head is then
    read back as such, and refused.
    """

    def common(self, hub: HubConfig) -> dict[str, Any]:
        """Return the arguments of DecoderConfig that all these families have."""
        heads, width = hub.integer("num_attention_heads"), hub.integer("hidden_size")
        kv_heads = heads
        if hub.value("num_key_value_heads") is not None:
            kv_heads = hub.integer("num_key_value_heads")
        head_width = 0
        if hub.value("head_dim") is not None:
            head_width = hub.integer("head_dim")
        activation = hub.require(self.activation_key, *self.activations)
        return {
            "layers": hub.integer("num_hidden_layers", most=MOST_LAYERS),
            "width": width,
            "heads": heads,
            "kv_heads": 0 if kv_heads == heads else kv_heads,
            "head_width": 0 if head_width * heads == width else head_width,
            "hidden": hub.integer("intermediate_size"),
            "context": hub.integer("max_position_embeddings"),
            "vocab_size": hub.integer("vocab_size"),
            "activation": self.activations[activation],
            "norm_epsilon": hub.number("rms_norm_eps"),
            "tied": hub.require("tie_word_embeddings", False, True),
            "attention_dropout": hub.share("attention_dropout"),
            **read_rope(hub),
        }

    def keys(self, spec: DecoderConfig) -> dict[str, Any]:
        theirs = {ours: name for name, ours in self.activations.items()}
        known = self.shares_width and not spec.head_width
        return {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.width,
            "intermediate_size": spec.hidden_width,
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.heads,
            "num_key_value_heads": spec.key_value_heads,
            **({} if known else {"head_dim": spec.head_features}),
            "max_position_embeddings": spec.context,
            "rms_norm_eps": spec.norm_epsilon,
            self.activation_key: theirs.get(spec.activation, next(iter(self.activations))),
            "tie_word_embeddings": spec.tied,
            "attention_dropout": spec.attention_dropout,
            **rope_keys(spec),
        }


class Llama(LlamaLike):
    """Pre-norm blocks with RMSNorm, rotary positions and SwiGLU."""

    model_types = ("llama",)
    architecture = "LlamaForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": 10000.0,
        }
    )

    def settings(self, hub: HubConfig) -> dict[str, Any]:
        bias = hub.require("mlp_bias", False, True)
        hub.require("attention_bias", bias)
        return {**self.common(hub), "bias": bias}

    def keys(self, spec: DecoderConfig) -> dict[str, Any]:
        return {**super().keys(spec), "attention_bias": spec.bias, "mlp_bias": spec.bias}
