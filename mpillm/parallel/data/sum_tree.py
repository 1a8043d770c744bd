"""Add up tensors in one binary tree, however many follow: the fixed order of microbatches."""

from torch import Tensor


class SumTree:
    """The sums of 2ᵏ tensors each, the largest k first, as a binary counter carries."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._leaves = 0

    def add(self, total: Tensor) -> None:
        """Add a tensor, which is then the tree's own."""
        place = self._leaves
        # A set low bit is a sum of equal size: merge, as in trees.tree_split.
        while place & 1:
            total = self._sums.pop().add_(total)
            place >>= 1
        self._sums.append(total)
        self._leaves += 1

    def take(self) -> Tensor | None:
        """Return the whole sum, None of none; the tree is empty then."""
        total = self._sums.pop() if self._sums else None
        while total is not None and self._sums:
            total = self._sums.pop().add_(total)
        self._leaves = 0
        return total
