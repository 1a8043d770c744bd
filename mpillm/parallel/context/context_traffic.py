"""What context parallelism moves, and which of its two kinds moves less: plain numbers.

Ring (Liu et al. 2023, "Ring attention with blockwise Transformers"): each rank reads the keys and
values of all others; backward it reads them again, and adds to their gradients. Ulysses (Jacobs et
al. 2023, "DeepSpeed Ulysses"): queries, keys, values and outputs change hands, heads for positions.
"""

from typing import Literal

from mpillm.errors import LayoutError
from mpillm.parallel.tensor.weight_cuts import own_key_value_heads

ContextKind = Literal["ring", "ulysses"]
AttentionShape = tuple[int, int, int]
"""Heads of queries, heads of keys and values, and the width of a head."""


def attention_bytes(
    kind: ContextKind,
    ranks: int,
    shape: AttentionShape,
    length: int,
    element: int = 4,
    gradient: int = 4,
) -> tuple[float, float]:
    """Return the bytes that a rank takes from others in one attention of a sequence of `length`,
    forward and backward.

    `element`: bytes of a number of the stream. `gradient`: of sums over ranks of gradients.
    """
    heads, kv_heads, width = shape
    own, others = length / ranks, ranks - 1
    if kind == "ring":
        numbers = 2 * own * kv_heads * width * others
        return numbers * element, numbers * (element + gradient)
    # Queries, keys and values to heads, the output back; and the gradients of all four.
    numbers = 2 * own * (heads + kv_heads) * width * others / ranks
    return numbers * element, numbers * element


def own_heads(shape: AttentionShape, tensor: int) -> AttentionShape:
    """Return the shape that a rank attends with where `tensor` ranks share the heads: the largest,
    where they do not divide the heads of keys and values.
    """
    heads, _, width = shape
    return heads // tensor, max(_key_value_heads(shape, tensor)), width


def _key_value_heads(shape: AttentionShape, tensor: int) -> set[int]:
    """Return the numbers of heads of keys and values that ranks attend to."""
    heads, kv_heads, _ = shape
    if kv_heads % tensor == 0:
        return {kv_heads // tensor}
    return {len(own_key_value_heads(heads, kv_heads, tensor, rank)) for rank in range(tensor)}


def exchanges_heads(ranks: int, shape: AttentionShape, tensor: int = 1) -> bool:
    """Return whether heads can be exchanged: the ranks divide those of queries, and those of keys
    and values, of each of `tensor` ranks.
    """
    counts = {shape[0] // tensor, *_key_value_heads(shape, tensor)}
    return all(count % ranks == 0 for count in counts)


def cheaper_kind(ranks: int, shape: AttentionShape, tensor: int = 1) -> ContextKind:
    """Return the kind that moves fewer bytes; the ring where both move as many.

    The length is a factor of both, and does not matter.
    """
    if not exchanges_heads(ranks, shape, tensor):
        return "ring"
    own = own_heads(shape, tensor)
    ring, ulysses = (sum(attention_bytes(kind, ranks, own, ranks)) for kind in KINDS)
    return "ulysses" if ulysses < ring else "ring"


KINDS: tuple[ContextKind, ContextKind] = ("ring", "ulysses")


def choose_kind(
    wanted: str, ranks: int, shape: AttentionShape, tensor: int = 1, device: str = "cpu"
) -> ContextKind:
    """Return the kind that the recipe asks for; `auto`: the cheaper one on a CPU, and the exchange
    of heads elsewhere.

    `shape`: of the whole model. Raises LayoutError where heads do not suffice, or for a ring on a
    device that is no CPU.
    """
    on_cpu = device == "cpu"
    if on_cpu and wanted == "ring":
        return "ring"
    if on_cpu and wanted == "auto":
        return cheaper_kind(ranks, shape, tensor)
    if not exchanges_heads(ranks, shape, tensor):
        raise LayoutError(_fault(ranks, shape, tensor, on_cpu))
    if wanted == "ring":
        raise LayoutError(
            'parallel.context_kind = "ring" computes on CPUs alone; on GPUs take "ulysses", which '
            "exchanges heads, or leave context_kind out"
        )
    return "ulysses"


def _fault(ranks: int, shape: AttentionShape, tensor: int, on_cpu: bool) -> str:
    """Say why heads cannot be exchanged, and which sizes can."""
    heads = shape[0] // tensor
    kv_heads = " or ".join(map(str, sorted(_key_value_heads(shape, tensor))))
    legal = [str(n) for n in range(1, heads + 1) if exchanges_heads(n, shape, tensor)]
    where = f" of each of {tensor} tensor ranks" if tensor > 1 else ""
    given = "on GPUs a context axis" if not on_cpu else 'parallel.context_kind = "ulysses"'
    out = ', or context_kind = "ring"' if on_cpu else ""
    return (
        f"{given} exchanges heads, and {ranks} context ranks do not divide {heads} heads of "
        f"queries and {kv_heads} of keys and values{where}; take parallel.context = "
        f"{' or '.join(legal)}{out}"
    )
