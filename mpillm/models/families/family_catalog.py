"""The table of families by `model_type`, as a Hugging Face `config.json` has it; needs no torch."""

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from mpillm.errors import RecipeError
from mpillm.models.families.family import Family
from mpillm.models.spec import ModelSpec
from mpillm.system.plugins import load_class

FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "gpt2": "mpillm.models.families.gpt2:GPT2",
        "llama": "mpillm.models.families.llama:Llama",
        "mistral": "mpillm.models.families.mistral:Mistral",
        "qwen2": "mpillm.models.families.qwen:Qwen2",
        "qwen3": "mpillm.models.families.qwen:Qwen3",
        "mixtral": "mpillm.models.families.mistral:Mixtral",
        "qwen2_moe": "mpillm.models.families.qwen_mixture:Qwen2Mixture",
        "qwen3_moe": "mpillm.models.families.qwen_mixture:Qwen3Mixture",
        "gemma": "mpillm.models.families.gemma:Gemma",
        "gemma2": "mpillm.models.families.gemma:Gemma2",
        "gemma3_text": "mpillm.models.families.gemma:Gemma3",
        "bert": "mpillm.models.families.bert:Bert",
        "roberta": "mpillm.models.families.bert:Roberta",
        "modernbert": "mpillm.models.families.modernbert:ModernBert",
        "vit": "mpillm.models.families.vit:ViT",
        "t5": "mpillm.models.families.t5:T5",
        "marian": "mpillm.models.families.marian:Marian",
        "whisper": "mpillm.models.families.whisper:Whisper",
    }
)


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a `config.json`. Raises RecipeError for an unsupported model_type."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise RecipeError(
            f"config.json has no model_type that is a text, but {kind!r}; "
            f"it names the family: {', '.join(FAMILIES)}"
        )
    if kind not in FAMILIES:
        near = get_close_matches(kind.lower(), FAMILIES, n=1, cutoff=0.5)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise RecipeError(
            f"config.json: model_type = {kind!r} is not supported{hint} "
            f"(supported: {', '.join(FAMILIES)})"
        )
    return load_class(kind, FAMILIES, "family", Family)()  # type: ignore[type-abstract]


def family_of(spec: ModelSpec) -> Family:
    """Return the first family that can be `spec`. Raises RecipeError where none can."""
    faults = []
    for family in (find_family({"model_type": kind}) for kind in FAMILIES):
        if family.stack != spec.architecture:
            continue
        try:
            family.config(spec)
        except RecipeError as fault:
            faults.append(str(fault))
        else:
            return family
    reason = "; ".join(faults) or f"there is none of the architecture {spec.architecture}"
    raise RecipeError(
        f"no family of Hugging Face is this model: {reason}; export its tensors under our names "
        "by --to safetensors"
    )
