"""Mistral (Jiang et al. 2023): Llama with a sliding window; Mixtral (Jiang et al. 2024)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.models.decoder import DecoderConfig
from mpillm.models.families.hub_config import HubConfig
from mpillm.models.families.llama import NAMES, LlamaLike
from mpillm.models.families.mixture_names import MixtureLike


class Mistral(LlamaLike):
    """Llama's blocks, all with one window or all without."""

    model_types = ("mistral",)
    architecture = "MistralForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "sliding_window": 4096,
            "rope_theta": 10000.0,
        }
    )

    def settings(self, hub: HubConfig) -> dict[str, Any]:
        return {**self.common(hub), "window": _window(hub)}

    def keys(self, spec: DecoderConfig) -> dict[str, Any]:
        return {**super().keys(spec), "sliding_window": spec.window or None}


class Mixtral(MixtureLike):
    """Mistral's blocks with eight experts, two of which each position passes."""

    model_types = ("mixtral",)
    architecture = "MixtralForCausalLM"
    experts_path = "block_sparse_moe.experts"
    experts_key = "num_local_experts"
    expert_names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"gate": "w1", "up": "w3", "down": "w2"}
    )
    names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {**NAMES, "feed_forward.router": "block_sparse_moe.gate"}
    )
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **Mistral.defaults,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "rope_theta": 1000000.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.0,
        }
    )

    def settings(self, hub: HubConfig) -> dict[str, Any]:
        hub.require("router_jitter_noise", 0.0)
        return {**self.common(hub), "window": _window(hub)}

    def keys(self, spec: DecoderConfig) -> dict[str, Any]:
        return {**super().keys(spec), "sliding_window": spec.window or None}


def _window(hub: HubConfig) -> int:
    return 0 if hub.value("sliding_window") is None else hub.integer("sliding_window")
