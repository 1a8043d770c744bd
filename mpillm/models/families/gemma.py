"""Gemma 1 to 3 (Gemma Team 2024, 2024, 2025): their text models."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.models.decoder import DecoderConfig
from mpillm.models.families.hub_config import HubConfig
from mpillm.models.families.llama import NAMES, LlamaLike
from mpillm.models.families.window_keys import layer_types, read_windows

# The first one is what keys of ours become.
ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {"gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
)
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 256000,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_theta": 10000.0,
    }
)
SANDWICH_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **NAMES,
        "attention_output_norm": "post_attention_layernorm",
        "forward_norm": "pre_feedforward_layernorm",
        "forward_output_norm": "post_feedforward_layernorm",
    }
)


class GemmaLike(LlamaLike):
    """What the three generations have in common: RMSNorm by 1 + weight, a scaled embedding."""

    activations: ClassVar[Mapping[str, str]] = ACTIVATIONS

    def common(self, hub: HubConfig) -> dict[str, Any]:
        hub.require("attention_bias", False)
        hub.require("use_bidirectional_attention", None, False)
        return {**super().common(hub), "norm": "rmsnorm1p", "scaled_embedding": True}


class Gemma(GemmaLike):
    """Pre-norm blocks with GeGLU."""

    model_types = ("gemma",)
    architecture = "GemmaForCausalLM"
    # Early files name the exact GELU, and mean the other.
    activations: ClassVar[Mapping[str, str]] = MappingProxyType({**ACTIVATIONS, "gelu": "geglu"})
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **DEFAULTS,
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "hidden_act": "gelu_pytorch_tanh",
        }
    )

    def settings(self, hub: HubConfig) -> dict[str, Any]:
        return self.common(hub)


class Gemma2(GemmaLike):
    """Sandwich norms, soft caps, and a window in every second layer."""

    model_types = ("gemma2",)
    architecture = "Gemma2ForCausalLM"
    names: ClassVar[Mapping[str, str]] = SANDWICH_NAMES
    activation_key = "hidden_activation"
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {**DEFAULTS, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
    )

    def settings(self, hub: HubConfig) -> dict[str, Any]:
        return {**self.sandwich(hub), **_windows(hub, 2)}

    def sandwich(self, hub: HubConfig) -> dict[str, Any]:
        """Return the arguments that Gemma 3 has, too."""
        found = self.common(hub)
        width = hub.number("query_pre_attn_scalar")
        features = found["head_width"] or found["width"] // found["heads"]
        return {
            **found,
            "norm_place": "sandwich",
            "query_scale_width": 0.0 if width == features else width,
            "attention_soft_cap": _cap(hub, "attn_logit_softcapping"),
            "logits_soft_cap": _cap(hub, "final_logit_softcapping"),
        }

    def keys(self, spec: DecoderConfig) -> dict[str, Any]:
        scale = spec.query_scale_width or spec.head_features
        return {
            **super().keys(spec),
            # transformers takes no other spelling of a whole number.
            "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
            "attn_logit_softcapping": spec.attention_soft_cap or None,
            "final_logit_softcapping": spec.logits_soft_cap or None,
            "layer_types": layer_types(spec),
            **({"sliding_window": spec.window} if spec.window else {}),
        }


class Gemma3(Gemma2):
    """Norms of queries and keys in place of soft caps, and two bases of rotary positions."""

    model_types = ("gemma3_text",)
    architecture = "Gemma3ForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **DEFAULTS,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
        }
    )

    def settings(self, hub: HubConfig) -> dict[str, Any]:
        keys = ("sliding_window_pattern", "_sliding_window_pattern")
        pattern = next((hub.integer(key, 0) for key in keys if hub.has(key)), 6)
        found = {**self.sandwich(hub), "query_key_norm": True, **_windows(hub, pattern)}
        local = hub.rope("sliding_attention", "rope_local_base_freq")
        if local["rope_type"] != "default":
            raise hub.fault("rope_type of sliding_attention", local["rope_type"], '"default"')
        if found["window"]:
            found["window_rope_theta"] = local["rope_theta"]
        return found

    def keys(self, spec: DecoderConfig) -> dict[str, Any]:
        found = super().keys(spec)
        local = spec.window_rope_theta or spec.rope_theta
        return {
            **found,
            "sliding_window_pattern": spec.full_every,
            "rope_local_base_freq": local,
            "rope_parameters": {
                "full_attention": found["rope_parameters"],
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            },
        }


def _windows(hub: HubConfig, full_every: int) -> dict[str, Any]:
    return read_windows(hub, full_every, hub.integer("sliding_window"))


def _cap(hub: HubConfig, key: str) -> float:
    return 0.0 if hub.value(key) is None else hub.number(key)
