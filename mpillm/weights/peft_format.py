"""The folder of PEFT's adapters: names and settings, from ours and to ours.

`adapter_config.json` holds the settings, `adapter_model.safetensors` the tensors
`base_model.model.MODULE.lora_A.weight` (rank, inputs), `.lora_B.weight` (outputs, rank) and
`.lora_magnitude_vector` (outputs). MODULE is transformers' name of a layer. Source: PEFT 0.18,
`utils/save_and_load.py`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from mpillm.errors import CheckpointError, MismatchError, RecipeError
from mpillm.models.families.family import Place
from mpillm.models.tuning import INFIX, AdapterSettings, layer_of
from mpillm.system.messages import some_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
OWN: Mapping[str, str] = MappingProxyType(
    {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
)
_THEIRS = re.compile(r"(.+)\.(?:lora_([AB])\.weight|(lora_magnitude_vector)(?:\.weight)?)")
# Settings of other adapters than ours: the value that means none of them.
UNREAD: Mapping[str, Any] = MappingProxyType(
    {
        "bias": "none",
        "lora_bias": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layer_replication": None,
        "trainable_token_indices": None,
        "target_parameters": None,
        "alora_invocation_tokens": None,
    }
)
# Ways to begin that change the base's weights: the adapter is next to others than the published.
CHANGE_BASE = ("corda", "loftq", "olora", "pissa")
TASKS = MappingProxyType(
    {"CausalLM": "CAUSAL_LM", "ConditionalGeneration": "SEQ_2_SEQ_LM", "Sequence": "SEQ_CLS"}
)


def their_names(names: Iterable[str], places: Mapping[str, Place]) -> dict[str, str]:
    """Map our names of trained weights to PEFT's. `places`: of the base's weights, in its family.

    Raises RecipeError where the family keeps several of our layers in one of its own.
    """
    found = {}
    for name in names:
        layer = layer_of(name)
        place = places[f"{layer}.weight" if layer else name]
        if place.box is not None or place.squeezed or (place.transposed and not layer):
            raise RecipeError(
                f"{place.name} of the family holds more than our {layer or name}, and PEFT's "
                "format has no adapter of a part; export the merged model: --to hf"
            )
        if layer:
            own = OWN[name.removeprefix(f"{layer}{INFIX}")]
            found[name] = f"{PREFIX}{place.name.removesuffix('.weight')}.{own}"
        else:
            found[name] = PREFIX + place.name
    return found


def peft_config(
    adapter: AdapterSettings,
    names: Iterable[str],
    places: Mapping[str, Place],
    base: str,
    model_class: str,
) -> dict[str, Any]:
    """Return `adapter_config.json`. `names`: ours of the trained weights. `base`: where it is."""
    own = list(names)
    layers = dict.fromkeys(filter(None, map(layer_of, own)))
    modules = [places[f"{layer}.weight"].name.removesuffix(".weight") for layer in layers]
    whole = {places[name].name.rpartition(".")[0] for name in own if not layer_of(name)}
    transposed = any(places[f"{layer}.weight"].transposed for layer in layers)
    task = next((task for end, task in TASKS.items() if end in model_class), None)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": _short(modules, [place.name for place in places.values()]),
        "modules_to_save": sorted(whole) or None,
        "use_dora": adapter.method == "dora",
        "use_rslora": False,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "inference_mode": True,
    }


def _short(modules: list[str], tensors: list[str]) -> list[str]:
    """Return the last words of the modules, where no other module ends so; else their names."""
    ends = dict.fromkeys(module.rpartition(".")[2] for module in modules)
    every = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    alike = {module for module in every if module.rpartition(".")[2] in ends}
    return list(ends) if alike == set(modules) else modules


def read_config(config: Mapping[str, Any], where: str) -> AdapterSettings:
    """Return the settings that a configuration means, with no targets yet.

    Raises CheckpointError for adapters of another kind.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where} is of the kind {kind!r}, and LORA is read")
    for key, none in UNREAD.items():
        if (value := config.get(key, none)) not in (none, None):
            raise CheckpointError(f"{where} has {key} = {value!r}, which no adapter of ours has")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_BASE):
        raise CheckpointError(
            f"{where} has init_lora_weights = {start!r}, which changed the weights of the base; "
            "merge it with that base in PEFT, and import the merged model"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) and alpha > 0):
        raise CheckpointError(f"{where} has r = {rank!r} and lora_alpha = {alpha!r}: both are > 0")
    # Its scale is alpha / √r.
    scaled = alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)
    method = "dora" if config.get("use_dora") else "lora"
    return AdapterSettings(method=method, rank=rank, alpha=scaled)  # type: ignore[arg-type]


def our_names(
    tensors: Mapping[str, tuple[int, ...]],
    places: Mapping[str, Place],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> dict[str, str]:
    """Map PEFT's names to ours. `tensors`: its shapes by name; `shapes`: of the base's weights.

    Raises MismatchError with names and shapes where the adapter is of another base.
    """
    ours = {place.name: name for name, place in places.items() if place.box is None}
    found, unknown = {}, []
    for theirs, shape in tensors.items():
        name = theirs.removeprefix(PREFIX)
        match = _THEIRS.fullmatch(name)
        own = ours.get(f"{match[1]}.weight" if match else name)
        if own is None:
            unknown.append(theirs)
            continue
        part = ((match[2] or "").lower() or "magnitude") if match else ""
        found[theirs] = f"{own.removesuffix('.weight')}{INFIX}{part}" if part else own
        outputs, inputs = shapes[own][0], shapes[own][-1]
        first, last = (shape[0], shape[-1]) if shape else (0, 0)
        wanted = {"a": (first, inputs), "b": (outputs, last), "magnitude": (outputs,)}
        if shape != wanted.get(part, shapes[own]):
            raise MismatchError(
                f"{where} is of another base: {theirs} has the shape {list(shape)}, and the "
                f"base's {own} {list(shapes[own])}; name its own base by --base"
            )
    if unknown:
        raise MismatchError(
            f"{where} is of another base, which has the layers of {some_of(unknown)}; name its "
            "own base by --base"
        )
    return found
