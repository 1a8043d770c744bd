"""Check how many ranks share out the experts: plain numbers, on a login node without MPI."""

import math
from collections.abc import Mapping

from mpillm.comm.mesh import describe
from mpillm.errors import LayoutError
from mpillm.models.spec import ModelSpec
from mpillm.parallel.axis_sizes import token_axes
from mpillm.parallel.parallel_axis import MessageBytes

SHOWN = 6
# An inbox grows by more than it must: few batches then make it grow again.
INBOX_GROWTH = 1.25


def check_experts(
    ranks: int,
    model: ModelSpec,
    sizes: Mapping[str, int],
    *,
    fixed_order: bool = False,
    noise_scale: bool = False,
) -> None:
    """Raise LayoutError where groups of `ranks` on a mesh of `sizes` cannot share the experts."""
    if ranks == 1:
        return
    given = f"parallel.experts = {ranks}"
    if not model.experts:
        raise LayoutError(
            f"{given} shares out the experts of mixtures, and the model has none; leave it out, or "
            "set model.experts"
        )
    along = {name: sizes[name] for name in token_axes(sizes)}
    together = math.prod(along.values())
    if together % ranks or model.experts % ranks:
        both = math.gcd(together, model.experts)
        legal = [n for n in range(1, both + 1) if both % n == 0]
        near = sorted(sorted(legal, key=lambda n: abs(n - ranks))[:SHOWN])
        raise LayoutError(
            f"{given} must divide the {together} rank(s) that share the tokens of a batch "
            f"({describe(along)}) and the {model.experts} experts of a mixture; take "
            f"{' or '.join(map(str, near))}"
        )
    if fixed_order:
        raise LayoutError(
            "train.fixed_order sums the tokens of each microbatch alone, and with "
            f"{given} an expert sums those of {ranks} ranks at once; leave one of them out"
        )
    if noise_scale:
        raise LayoutError(
            "train.noise_scale compares the gradients of data ranks, and with "
            f"{given} those of experts are of {ranks} ranks at once; leave one of them out"
        )
    if sizes.get("tensor", 1) > 1:
        raise LayoutError(
            f"parallel.tensor = {sizes['tensor']} cuts each expert, and {given} gives whole ones "
            "to ranks; leave one of them out"
        )


def exchange_bytes(
    ranks: int, model: ModelSpec, sizes: Mapping[str, int], batch: int, element: MessageBytes
) -> float:
    """Estimate the bytes that a rank sends more in a step where `ranks` share out the experts.

    Tokens pass to the owners and back, and so do their gradients. Sums of experts' gradients are
    over fewer ranks, and of fewer experts.
    """
    together, stages = math.prod(sizes[name] for name in token_axes(sizes)), sizes["pipeline"]
    rows = batch * model.context / together * model.experts_per_token * model.blocks / stages
    sent = 4 * rows * max(model.stream_widths) * element.stream * (ranks - 1) / ranks
    gradients = element.gradient * model.expert_parameters_of(model.whole) / stages
    owners = max(1, together // ranks)
    # The axes count them as sums of all weights. Those of experts are replicated: sent twice.
    fewer = element.sends * (together - 1) / together - 2 * (owners - 1) / owners / ranks
    return sent - gradients * fewer


def own_experts(experts: int, ranks: int, rank: int) -> range:
    """Return the numbers of the experts that rank number `rank` of a group owns."""
    each = experts // ranks
    return range(rank * each, (rank + 1) * each)
