"""The mixtures of experts of Qwen 1.5 and 2 (Yang et al. 2024) and of Qwen 3 (Yang et al. 2025)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.models.decoder import DecoderConfig
from mpillm.models.families.hub_config import HubConfig
from mpillm.models.families.llama import NAMES
from mpillm.models.families.mixture_names import MixtureLike
from mpillm.models.families.qwen import DEFAULTS

ROUTER_NAMES: Mapping[str, str] = MappingProxyType({**NAMES, "feed_forward.router": "mlp.gate"})
SHARED_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **ROUTER_NAMES,
        "feed_forward.shared.gate": "mlp.shared_expert.gate_proj",
        "feed_forward.shared.up": "mlp.shared_expert.up_proj",
        "feed_forward.shared.down": "mlp.shared_expert.down_proj",
        "feed_forward.shared_factor": "mlp.shared_expert_gate",
    }
)
MIXTURE_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        **DEFAULTS,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    }
)


class QwenMixture(MixtureLike):
    """What both generations have in common."""

    def common(self, hub: HubConfig) -> dict[str, Any]:
        hub.require("use_sliding_window", False)
        hub.require("decoder_sparse_step", 1)
        hub.require("mlp_only_layers", None, [])
        of_chosen = hub.require("norm_topk_prob", False, True)
        return {
            **super().common(hub),
            "hidden": hub.integer("moe_intermediate_size"),
            "expert_softmax": "chosen" if of_chosen else "all",
        }

    def keys(self, spec: DecoderConfig) -> dict[str, Any]:
        return {
            **super().keys(spec),
            "moe_intermediate_size": spec.hidden_width,
            "norm_topk_prob": spec.expert_softmax == "chosen",
        }


class Qwen2Mixture(QwenMixture):
    """Blocks of Qwen 2 with experts, and a shared one that a gate scales."""

    model_types = ("qwen2_moe",)
    architecture = "Qwen2MoeForCausalLM"
    shares_width = True
    names: ClassVar[Mapping[str, str]] = SHARED_NAMES
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **MIXTURE_DEFAULTS,
            "intermediate_size": 5632,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "num_experts": 60,
            "qkv_bias": True,
        }
    )

    def settings(self, hub: HubConfig) -> dict[str, Any]:
        return {
            **self.common(hub),
            "qkv_bias": hub.require("qkv_bias", False, True),
            "shared_hidden": hub.integer("shared_expert_intermediate_size"),
            "shared_gate": True,
        }

    def keys(self, spec: DecoderConfig) -> dict[str, Any]:
        return {
            **super().keys(spec),
            "qkv_bias": spec.qkv_bias,
            "shared_expert_intermediate_size": spec.shared_hidden or spec.hidden_width,
        }


class Qwen3Mixture(QwenMixture):
    """Blocks of Qwen 3 with experts."""

    model_types = ("qwen3_moe",)
    architecture = "Qwen3MoeForCausalLM"
    names: ClassVar[Mapping[str, str]] = ROUTER_NAMES
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **MIXTURE_DEFAULTS,
            "intermediate_size": 6144,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
            "attention_bias": False,
        }
    )

    def settings(self, hub: HubConfig) -> dict[str, Any]:
        hub.require("attention_bias", False)
        return {**self.common(hub), "query_key_norm": True}

    def keys(self, spec: DecoderConfig) -> dict[str, Any]:
        return {**super().keys(spec), "attention_bias": False}
