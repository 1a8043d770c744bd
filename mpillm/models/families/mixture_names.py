"""Names of a mixture of experts: what Mixtral and the mixtures of Qwen have in common."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.models.decoder import DecoderConfig
from mpillm.models.families.hub_config import MOST_EXPERTS, HubConfig
from mpillm.models.families.llama import LlamaLike

EXPERT = re.compile(r"layers\.(\d+)\.feed_forward\.experts\.(\d+)\.(\w+)\.weight")


class MixtureLike(LlamaLike):
    """The families in each of whose blocks a router chooses experts."""

    experts_path: ClassVar[str] = "mlp.experts"
    """Ahead of an expert's number."""
    experts_key: ClassVar[str] = "num_experts"
    expert_names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    )

    def renamed(self, name: str) -> str:
        found = EXPERT.fullmatch(name)
        if found is None:
            return super().renamed(name)
        expert = f"{self.experts_path}.{found[2]}.{self.expert_names[found[3]]}"
        return f"{self.block}{found[1]}.{expert}.weight"

    def common(self, hub: HubConfig) -> dict[str, Any]:
        # transformers 5 gives all of them one key.
        key = "num_local_experts" if hub.has("num_local_experts") else self.experts_key
        return {
            **super().common(hub),
            "experts": hub.integer(key, most=MOST_EXPERTS),
            "experts_per_token": hub.integer("num_experts_per_tok"),
        }

    def keys(self, spec: DecoderConfig) -> dict[str, Any]:
        return {
            **super().keys(spec),
            self.experts_key: spec.experts,
            "num_experts_per_tok": spec.experts_per_token,
        }
