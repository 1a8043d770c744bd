"""Rotary positions in a `config.json`: the base, and the scalings for longer contexts."""

from typing import Any

from mpillm.models.decoder import DecoderConfig
from mpillm.models.families.hub_config import HubConfig

# Keys of YaRN that transformers computes or sets; other values are another scaling.
YARN_DEFAULTS = {
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "mscale": 0,
    "mscale_all_dim": 0,
}


def read_rope(hub: HubConfig) -> dict[str, Any]:
    """Return the arguments of DecoderConfig for the layers without a window. Raises RecipeError."""
    rope = hub.rope()
    found: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if (share := rope.get("partial_rotary_factor")) not in (None, 1):
        raise hub.fault("partial_rotary_factor", share, "1")
    kind = rope["rope_type"]
    if kind == "default":
        return found
    if kind not in ("linear", "llama3", "yarn"):
        raise hub.fault("rope_type", kind, '"default", "linear", "llama3" or "yarn"')
    found |= {"rope_scaling": kind, "rope_factor": hub.positive("factor", rope.get("factor"))}
    if kind == "linear":
        return found
    key = "original_max_position_embeddings"
    original = rope.get(key) or hub.value(key) or hub.value("max_position_embeddings")
    found["rope_original_context"] = int(hub.positive(key, original))
    if kind == "llama3":
        found["rope_low"] = hub.positive("low_freq_factor", rope.get("low_freq_factor"))
        found["rope_high"] = hub.positive("high_freq_factor", rope.get("high_freq_factor"))
        return found
    if rope.get("attention_factor") is not None:
        raise hub.fault("attention_factor", rope["attention_factor"], "the one that YaRN computes")
    for name, usual in YARN_DEFAULTS.items():
        if (value := rope.get(name)) is not None and value != usual:
            raise hub.fault(name, value, str(usual))
    return found


def rope_keys(spec: DecoderConfig) -> dict[str, Any]:
    """Return the keys of transformers 4 and of transformers 5."""
    scaling = scaling_of(spec)
    return {
        "rope_theta": spec.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            **(scaling or {"rope_type": "default"}),
            "rope_theta": spec.rope_theta,
        },
    }


def scaling_of(spec: DecoderConfig) -> dict[str, Any] | None:
    """Return the keys of the scaling; None where there is none."""
    if spec.rope_scaling == "none":
        return None
    found: dict[str, Any] = {"rope_type": spec.rope_scaling, "factor": spec.rope_factor}
    if spec.rope_scaling != "linear":
        original = spec.rope_original_context or round(spec.context / spec.rope_factor)
        found["original_max_position_embeddings"] = original
    if spec.rope_scaling == "llama3":
        found |= {"low_freq_factor": spec.rope_low, "high_freq_factor": spec.rope_high}
    return found
