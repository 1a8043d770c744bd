"""Which part of each weight a rank of the tensor axis holds: plain numbers, without torch.

A weight is cut along one dim into consecutive parts. The parts may differ by one unit, so a
vocabulary or a number of hidden features that the ranks do not divide needs no padding. Heads are
units that no cut splits (Shoeybi et al. 2019, "Megatron-LM").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.models.spec import ModelSpec
from mpillm.models.tuning import INFIX, layer_of

# Columns of a matrix product in parts of whole vectors and tiles, where a part is long enough that
# the largest is at most 1/8 longer than the mean.
COLUMNS = 64
LEAST_TILES = 8
# The dim of a layer's weight that a weight of its adapter shares, and that is its own dim, too.
ADAPTER_DIMS = {"a": 1, "b": 0, "magnitude": 0}


@dataclass(frozen=True)
class WeightCut:
    """The part of a whole weight that a rank holds: indices `first` to `last` − 1 along `dim`."""

    dim: int
    first: int
    last: int
    shape: tuple[int, ...]
    """Of the whole weight."""

    @property
    def start(self) -> tuple[int, ...]:
        """The index of the part's first element in the whole weight."""
        return tuple(self.first if dim == self.dim else 0 for dim in range(len(self.shape)))

    @property
    def index(self) -> tuple[slice, ...]:
        """The index of the part in the whole weight."""
        return (*(slice(None) for _ in range(self.dim)), slice(self.first, self.last))


def cut_of(
    spec: ModelSpec, name: str, shape: Sequence[int], size: int, rank: int
) -> WeightCut | None:
    """Return the part of the weight `name` of `shape` that `rank` of `size` ranks holds; None where
    each rank holds all of it.
    """
    layer = layer_of(name)
    own = name.removeprefix(f"{layer}{INFIX}")
    name = f"{layer}.weight" if layer else name
    dim = _of_name(spec.cut_dims, name)
    # An adapter's factors have the outputs, or the inputs, of their layer.
    if dim is None or (layer and ADAPTER_DIMS[own] != dim):
        return None
    count = shape[dim]
    units = _of_name(spec.cut_units, name)
    if units is None:
        bounds = column_bounds(count, size)
    elif units % size:
        # Heads of keys and values that the ranks do not divide: each rank selects its own ones.
        return None
    else:
        bounds = [rank * count // size for rank in range(size + 1)]
    return WeightCut(dim, bounds[rank], bounds[rank + 1], tuple(shape))


def _of_name(values: Mapping[str, int], name: str) -> int | None:
    """Return the value of the end of `name`, which begins at a whole word."""
    for end, value in values.items():
        if name == end or name.endswith(f".{end}"):
            return value
    return None


def column_bounds(count: int, size: int) -> list[int]:
    """Return where the parts of `count` columns, or tokens of a vocabulary, begin, and the end."""
    unit = COLUMNS if count >= size * LEAST_TILES * COLUMNS else 1
    return [min(count, bound * unit) for bound in block_bounds(-(-count // unit), size)]


def own_key_value_heads(heads: int, key_value_heads: int, size: int, rank: int) -> list[int]:
    """Return the heads of keys and values that the query heads of `rank` attend to, in order.

    Each of them serves equally many query heads in a row, as in grouped-query attention. Where the
    groups of the rank are unequal, a head is named once for each query head.
    """
    group, own = heads // key_value_heads, heads // size
    named = [head // group for head in range(rank * own, (rank + 1) * own)]
    distinct = list(dict.fromkeys(named))
    each, rest = divmod(own, len(distinct))
    regular = not rest and named == [head for head in distinct for _ in range(each)]
    return distinct if regular else named
