"""Qwen 2 and 2.5 (Yang et al. 2024) and Qwen 3 (Yang et al. 2025)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.models.decoder import DecoderConfig
from mpillm.models.families.hub_config import HubConfig
from mpillm.models.families.llama import LlamaLike
from mpillm.models.families.window_keys import layer_types, read_windows

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "rope_theta": 10000.0,
    }
)


class Qwen2(LlamaLike):
    """Llama's blocks with biases of query, key and value."""

    model_types = ("qwen2",)
    architecture = "Qwen2ForCausalLM"
    shares_width = True
    defaults: ClassVar[Mapping[str, Any]] = DEFAULTS

    def settings(self, hub: HubConfig) -> dict[str, Any]:
        return {**self.common(hub), **_windows(hub), "qkv_bias": True}

    def keys(self, spec: DecoderConfig) -> dict[str, Any]:
        return {**super().keys(spec), **_window_keys(spec)}


class Qwen3(LlamaLike):
    """Llama's blocks with norms of queries and keys, and a width of heads of its own."""

    model_types = ("qwen3",)
    architecture = "Qwen3ForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {**DEFAULTS, "head_dim": 128, "attention_bias": False}
    )

    def settings(self, hub: HubConfig) -> dict[str, Any]:
        hub.require("attention_bias", False)
        return {**self.common(hub), **_windows(hub), "query_key_norm": True}

    def keys(self, spec: DecoderConfig) -> dict[str, Any]:
        return {**super().keys(spec), "attention_bias": False, **_window_keys(spec)}


def _windows(hub: HubConfig) -> dict[str, Any]:
    """Return the windows: of all layers, or of none."""
    if not hub.require("use_sliding_window", False, True) or hub.value("sliding_window") is None:
        return {}
    first, layers = hub.integer("max_window_layers", 0), hub.integer("num_hidden_layers")
    if hub.value("layer_types") is None and first >= layers:
        return {}
    if hub.value("layer_types") is None and first:
        raise hub.fault("max_window_layers", first, f"0, or num_hidden_layers = {layers}")
    return read_windows(hub, 0, hub.integer("sliding_window"))


def _window_keys(spec: DecoderConfig) -> dict[str, Any]:
    if not spec.window:
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": spec.window,
        "max_window_layers": 0,
        "layer_types": layer_types(spec),
    }
