"""Check how many ranks share out the experts: plain numbers, on a login node without MPI."""

import math
from collections.abc import Mapping

from mpillm.comm.mesh import describe
from mpillm.errors import LayoutError
from mpillm.models.spec import ModelSpec
from mpillm.parallel.axis_sizes import token_axes

SHOWN = 6


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


def own_experts(experts: int, ranks: int, rank: int) -> range:
    """Return the numbers of the experts that rank number `rank` of a group owns."""
    each = experts // ranks
    return range(rank * each, (rank + 1) * each)
