"""Mistral (Jiang et al. 2023): Llama with a sliding window."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.models.decoder import DecoderConfig
from mpillm.models.families.hub_config import HubConfig
from mpillm.models.families.llama import LlamaLike


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
        window = 0 if hub.value("sliding_window") is None else hub.integer("sliding_window")
        return {**self.common(hub), "window": window}

    def keys(self, spec: DecoderConfig) -> dict[str, Any]:
        return {**super().keys(spec), "sliding_window": spec.window or None}
