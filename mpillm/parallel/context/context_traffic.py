"""What context parallelism moves, and which of its two kinds moves less: plain numbers.

Ring (Liu et al. 2023, "Ring attention with blockwise Transformers"): each rank reads the keys and
values of all others; backward it reads them again, and adds to their gradients. Ulysses (Jacobs et
al. 2023, "DeepSpeed Ulysses"): queries, keys, values and outputs change hands, heads for positions.
"""

from typing import Literal

from mpillm.errors import LayoutError

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
    """Return the shape of what a rank computes where `tensor` ranks share the heads.

    Heads of keys and values that they do not divide are on several ranks, in unequal numbers: one
    is taken, which no ranks exchange.
    """
    heads, kv_heads, width = shape
    return heads // tensor, kv_heads // tensor if kv_heads % tensor == 0 else 1, width


def exchanges_heads(ranks: int, shape: AttentionShape) -> bool:
    """Return whether heads can be exchanged: the ranks divide both numbers."""
    heads, kv_heads, _ = shape
    return heads % ranks == 0 and kv_heads % ranks == 0


def cheaper_kind(ranks: int, shape: AttentionShape) -> ContextKind:
    """Return the kind that moves fewer bytes; the ring where both move as many.

    The length is a factor of both, and does not matter.
    """
    if not exchanges_heads(ranks, shape):
        return "ring"
    ring, ulysses = (sum(attention_bytes(kind, ranks, shape, ranks)) for kind in KINDS)
    return "ulysses" if ulysses < ring else "ring"


KINDS: tuple[ContextKind, ContextKind] = ("ring", "ulysses")


def choose_kind(wanted: str, ranks: int, shape: AttentionShape) -> ContextKind:
    """Return the kind that the recipe asks for. Raises LayoutError where heads do not suffice."""
    if wanted == "ring":
        return "ring"
    if wanted == "auto":
        return cheaper_kind(ranks, shape)
    if not exchanges_heads(ranks, shape):
        heads, kv_heads, _ = shape
        raise LayoutError(
            f'parallel.context_kind = "ulysses" exchanges heads, and {ranks} context ranks do not '
            f"divide {heads} heads of queries and {kv_heads} of keys and values; "
            'take "ring", or leave context_kind out'
        )
    return "ulysses"
