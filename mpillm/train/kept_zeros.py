"""Keep the zeros of a pruned model in training: masks of what the optimizer steps on."""

from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor


class KeptZeros:
    """Elements that are 0 after each update, as they are when it is made."""

    def __init__(self, masked: Iterable[tuple[Tensor, Tensor]]) -> None:
        """`masked`: tensors that the optimizer steps on, each with the mask of its zeros."""
        self._masked = list(masked)

    @classmethod
    def of(cls, stepped: Mapping[str, Tensor], layers: Iterable[str]) -> Self:
        """Find the zeros in the weights of `layers`, whole or a rank's part of them.

        A run that continues finds the same: a checkpoint holds them.
        """
        names = [f"{layer}.weight" for layer in layers if f"{layer}.weight" in stepped]
        masks = ((stepped[name], stepped[name].detach() == 0) for name in names)
        return cls((weight, mask) for weight, mask in masks if mask.any())

    @torch.no_grad()
    def restore(self) -> None:
        """Set them to 0 again, after the optimizer has stepped."""
        for weight, mask in self._masked:
            weight.masked_fill_(mask, 0.0)
