"""Layers with a sliding window in a `config.json`: `sliding_window` and `layer_types`."""

from typing import Any

from mpillm.models.block_settings import BlockSettings
from mpillm.models.decoder import DecoderConfig
from mpillm.models.families.hub_config import HubConfig

KINDS = {True: "sliding_attention", False: "full_attention"}


def layer_types(spec: BlockSettings) -> list[str]:
    """Return the kind of each layer, by transformers' names."""
    return [KINDS[spec.slides(block)] for block in range(spec.layers)]


def read_windows(
    hub: HubConfig, full_every: int, window: int, full_first: int = 0
) -> dict[str, Any]:
    """Return `window`, `full_every` and `full_first` of the layers. Raises RecipeError for another
    order.

    `full_every`, `full_first`: what the family has without `layer_types`; 0: no layer is full.
    """
    given = hub.value("layer_types")
    if given is None:
        return {"window": window, "full_every": full_every, "full_first": full_first}
    if not isinstance(given, list) or len(given) != hub.integer("num_hidden_layers"):
        raise hub.fault("layer_types", given, "one kind for each of num_hidden_layers")
    full = [number for number, kind in enumerate(given, 1) if kind == KINDS[False]]
    if len(full) == len(given):
        return {"window": 0, "full_every": 0, "full_first": 0}
    # The family's own rule first: few layers agree with several rules.
    rules = [(full_every, full_first), (full[0] if full else 0, 0)]
    if len(full) > 1 and full[0] <= full[1] - full[0]:
        rules.append((full[1] - full[0], full[0]))
    for every, first in rules:
        # The rule is that of a decoder's layers, and of an encoder's.
        spec = DecoderConfig(layers=len(given), window=window, full_every=every, full_first=first)
        if layer_types(spec) == given:
            return {"window": window, "full_every": every, "full_first": first}
    raise hub.fault("layer_types", given, "sliding_attention with every n-th full_attention")
