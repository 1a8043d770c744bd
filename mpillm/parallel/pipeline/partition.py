"""Which layers each stage of a pipeline holds, so that no stage is slower than need be."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Literal

from mpillm.errors import LayoutError
from mpillm.models.config import DecoderConfig
from mpillm.models.decoder import Part


def share_layers(
    config: DecoderConfig, stages: int, wanted: Literal["auto"] | Sequence[int] = "auto"
) -> list[Part]:
    """The part of the model that each of `stages` stages holds: one layer at the least.

    `wanted`: the numbers of layers; auto makes the dearest stage as cheap as can be. Raises LayoutError.
    """
    if stages > config.layers:
        raise LayoutError(
            f"{stages} stages need a layer each, and the model has {config.layers}; lower parallel.pipeline or "
            f"parallel.chunks to {config.layers} stages at the most, or raise model.layers"
        )
    if wanted == "auto":
        counts = even_counts([layer_flops(config)] * config.layers, 0.0, head_flops(config), stages)
    else:
        counts = [int(count) for count in wanted]
        if len(counts) != stages or sum(counts) != config.layers:
            raise LayoutError(
                f"parallel.stages = {counts} shares out {sum(counts)} layers over {len(counts)} stages; the model has "
                f'{config.layers} layers and the schedule {stages} stages; mend the list, or take stages = "auto"'
            )
    firsts = [sum(counts[:stage]) for stage in range(stages + 1)]
    return [Part(first, last) for first, last in pairwise(firsts)]


def layer_flops(config: DecoderConfig) -> float:
    """Operations of one layer for one token, forward and backward: its share in `flops_per_token`."""
    return (config.flops_per_token - 6 * config.vocab_size * config.width) / config.layers


def head_flops(config: DecoderConfig) -> float:
    """Operations of the head for one token, forward and backward.

    The loss is not counted: the head's one large product runs so much faster than a layer's many small ones that both
    together take 0.9 to 1.0 of this (docs/notes.md).
    """
    return 6.0 * config.vocab_size * config.width


def even_counts(layers: Sequence[float], before: float, behind: float, stages: int) -> list[int]:
    """Cut `layers` (their costs) into runs of one at least, so that the dearest run is cheapest, and then the runs most
    even (least sum of squares). `before` is added to the first run, `behind` to the last.
    """
    costs = [*layers]
    costs[0] += before
    costs[-1] += behind
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    @cache
    def best(first: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """(dearest, sum of squares, counts) of the layers from `first` on in `left` runs."""
        if left == 1:
            cost = sums[-1] - sums[first]
            return cost, cost * cost, (len(costs) - first,)
        found = []
        for last in range(first + 1, len(costs) - left + 2):
            dearest, squares, counts = best(last, left - 1)
            cost = sums[last] - sums[first]
            found.append((max(dearest, cost), squares + cost * cost, (last - first, *counts)))
        return min(found)

    return list(best(0, stages)[2])
