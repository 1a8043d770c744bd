"""Cut a model into stages, so that the slowest stage is as fast as it can be."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Literal

from mpillm.errors import LayoutError
from mpillm.models.spec import ModelSpec, Part, Recompute, recompute_of

# A block that is recomputed has two forward passes and a backward pass, which costs two forward
# passes.
RECOMPUTE_COST = 4 / 3


def partition_blocks(
    model: ModelSpec,
    stages: int,
    wanted: Literal["auto"] | Sequence[int] = "auto",
    recompute: Recompute = "none",
) -> list[Part]:
    """Return the part of the model that each of `stages` stages holds: one block at least.

    `wanted`: the numbers of blocks; auto minimises the FLOPs of the dearest stage, those of
    `recompute` included. Raises LayoutError.
    """
    if stages > model.blocks:
        raise LayoutError(
            f"{stages} stages need a layer each, and the model has {model.blocks}; lower "
            f"parallel.pipeline or parallel.chunks to {model.blocks} stages at most, or raise "
            "model.layers"
        )
    if wanted == "auto":
        whole = [recompute_of(recompute, block) == "full" for block in range(model.blocks)]
        costs = [
            flops * (RECOMPUTE_COST if again else 1)
            for flops, again in zip(model.block_flops, whole, strict=True)
        ]
        counts = even_counts(costs, *model.end_flops, stages)
    else:
        counts = [int(count) for count in wanted]
        if len(counts) != stages or sum(counts) != model.blocks:
            raise LayoutError(
                f"parallel.stages = {counts} shares out {sum(counts)} layers over {len(counts)} "
                f"stages; the model has {model.blocks} layers and the schedule {stages} stages; "
                'correct the list, or take stages = "auto"'
            )
    firsts = [sum(counts[:stage]) for stage in range(stages + 1)]
    return [Part(first, last) for first, last in pairwise(firsts)]


def even_counts(blocks: Sequence[float], before: float, after: float, stages: int) -> list[int]:
    """Cut `blocks` (their costs) into `stages` runs of at least one block.

    The dearest run is cheapest; among such cuts the sum of squares is least. `before` is added to
    the first run, `after` to the last.
    """
    costs = [*blocks]
    # The embedding is computed with the first run, the head with the last.
    costs[0] += before
    costs[-1] += after
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    # Dynamic programming over (first block, runs left): O(stages · blocks²) instead of all cuts.
    @cache
    def best(first: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """Return (dearest, sum of squares, counts) of the blocks from `first` on in `left` runs."""
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
