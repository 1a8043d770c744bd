"""What a compression method is: the base of each, and its options.

Shapes: O outputs, I inputs of a linear layer.
"""

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from mpillm.errors import UsageError
from mpillm.infer.compress.input_statistics import InputStatistics
from mpillm.models.layers.stored.stored_codes import GROUPS, StoredCodes, StoredFormat
from mpillm.models.spec import ModelSpec


class Cut(NamedTuple):
    """A layer with fewer inputs."""

    kept_K: Tensor
    """The numbers of the inputs that stay, ascending."""
    weight_OK: Tensor


Solved = StoredCodes | Tensor | Cut
"""A stored weight, a dense one (O, I), or one of fewer inputs."""


@dataclass(frozen=True)
class CompressionOptions:
    """The options of all methods; each reads its own."""

    group: int = 64
    """Inputs that share a scale in int4."""
    sparsity: float = 0.5
    """The share of weights, heads or columns to remove."""
    pattern: str = ""
    """N:M, zeros in each M weights of a row, such as 2:4; "": anywhere."""
    alpha: float = 0.5
    """Of SmoothQuant: how much of the range moves from inputs to weights, 0 to 1."""

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            known = ", ".join(map(str, GROUPS))
            raise UsageError(f"--group {self.group} is no group of int4 kernels; take {known}")
        if not 0 < self.sparsity < 1:
            raise UsageError(f"--sparsity {self.sparsity} is a share; take one between 0 and 1")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"--alpha {self.alpha} is a share; take one from 0 to 1")
        self.zeros_of()

    def zeros_of(self) -> tuple[int, int]:
        """Return (N, M) of the pattern; (0, 0) without one. Raises UsageError."""
        if not self.pattern:
            return 0, 0
        first, _, second = self.pattern.partition(":")
        if first.isdecimal() and second.isdecimal() and 0 < int(first) < int(second) <= 64:
            return int(first), int(second)
        raise UsageError(
            f"--pattern {self.pattern} means N zeros in each M weights of a row, as 2:4; take "
            "0 < N < M ≤ 64"
        )


class CompressionMethod(ABC):
    """Compress a model, one block after the other.

    A plug-in derives from it, and is named as `package.module:Name`.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool] = False
    """Whether it reads the inputs of layers."""
    needs_products: ClassVar[bool] = False
    """Whether it reads the sums of the products of inputs, X · Xᵀ."""
    prunes: ClassVar[bool] = False
    """Whether it sets weights to zero; otherwise it stores them in fewer bits."""

    def __init__(self, options: CompressionOptions) -> None:
        self.options = options

    @property
    def format(self) -> StoredFormat | None:
        """How the weights are stored; None: as they were."""
        return None

    def check_model(self, spec: ModelSpec) -> None:  # noqa: B027
        """Raise MismatchError where the method is not for such a model."""

    def reads(self, name: str) -> bool:
        """Return whether the layer `name` is solved."""
        return True

    def check_layer(self, name: str, shape: tuple[int, int]) -> None:
        """Raise UsageError where a layer (O, I) cannot be compressed so."""
        layout = self.format
        if layout is not None and not layout.divides(shape[1]):
            fitting = [str(group) for group in GROUPS if shape[1] % group == 0]
            way = f"--group {' or '.join(fitting)}" if fitting else "a method of int8"
            raise UsageError(
                f"{name} has {shape[1]} inputs, which groups of {layout.group} do not divide; "
                f"take {way}"
            )
        _, every = self.options.zeros_of()
        if self.prunes and every and shape[1] % every:
            raise UsageError(
                f"{name} has {shape[1]} inputs, which --pattern {self.options.pattern} does not "
                "divide; leave the pattern out"
            )

    def smooth(self, weights: Sequence[Tensor], inputs: InputStatistics) -> Tensor | None:
        """Return factors (I,) by which the inputs of layers are divided, and their weights
        multiplied; None: the layers stay. `weights`: (O, I) of the layers that share the inputs.
        """
        return None

    def solve(self, weight_OI: Tensor, inputs: InputStatistics | None) -> Solved:
        """Compress the weight of a layer. `inputs`: of the method that needs data."""
        raise NotImplementedError

    def apply(self, parent: nn.Module, layer: nn.Linear, solved: Solved) -> None:
        """Put what was solved into the layer, an attribute of `parent`: as dense values."""
        assert not isinstance(solved, Cut)
        layer.weight.copy_(solved.decoded() if isinstance(solved, StoredCodes) else solved)

    def reshape(self, spec: ModelSpec) -> ModelSpec:
        """Return the settings of the compressed model: other sizes of a structured method."""
        return spec
