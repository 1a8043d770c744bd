"""Layers with a sliding window in a `config.json`: `sliding_window` and `layer_types`."""

from typing import Any

from mpillm.models.decoder import DecoderConfig
from mpillm.models.families.hub_config import HubConfig

KINDS = {True: "sliding_attention", False: "full_attention"}


def layer_types(spec: DecoderConfig) -> list[str]:
    """Return the kind of each layer, by transformers' names."""
    return [KINDS[spec.slides(block)] for block in range(spec.layers)]


def read_windows(hub: HubConfig, full_every: int, window: int) -> dict[str, Any]:
    """Return `window` and `full_every` of the layers. Raises RecipeError for another order.

    `full_every`: what the family has without `layer_types`; 0: no layer is full.
    """
    given = hub.value("layer_types")
    if given is None:
        return {"window": window, "full_every": full_every}
    if not isinstance(given, list) or len(given) != hub.integer("num_hidden_layers"):
        raise hub.fault("layer_types", given, "one kind for each of num_hidden_layers")
    if all(kind == KINDS[False] for kind in given):
        return {"window": 0, "full_every": 0}
    # The family's own rule first: few layers agree with several rules.
    first_full = given.index(KINDS[False]) + 1 if KINDS[False] in given else 0
    for every in (full_every, first_full):
        spec = DecoderConfig(layers=len(given), window=window, full_every=every)
        if layer_types(spec) == given:
            return {"window": window, "full_every": every}
    raise hub.fault("layer_types", given, "sliding_attention with every n-th full_attention")
