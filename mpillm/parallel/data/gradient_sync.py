"""The base of all gradient synchronisations: how the gradients of one step are summed.

Replicated buckets are one file (replicated.py); each ZeRO stage is another.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from mpillm.models.part_module import PartModule

Gradients = Iterable[tuple[nn.Parameter, Tensor]]


class PassWeights(Protocol):
    """Weights that a rank has only within passes. Every rank of the axis calls each of these."""

    progress: Callable[[], None] | None
    """Called while ranks wait for weights: it passes on the streams between stages."""

    @property
    def nodes_apart(self) -> bool:
        """Whether each node has all shards, so that the weights of nodes may be compared."""

    def reading(self) -> AbstractContextManager[None]:
        """Let the block run passes."""

    def read_each(self, weights: Iterable[nn.Parameter]) -> Iterator[Tensor]:
        """Yield a copy of each weight, one after another."""

    def before_gradients(self, leaves: Sequence[Tensor]) -> None:
        """Gather ahead of the gradients of `leaves` alone: the weight half of a backward pass."""

    def pass_ended(self) -> None:
        """Note that a backward pass, or a half of it, is complete."""


class GradientSync(ABC):
    """The gradients of a rank's parts of the model. Every rank of the data axis makes one, with the
    same parameters.

    A step: `begin`; backward passes, with `last_microbatch` ahead of a part's last one and
    `microbatch_ended` after each; `finish`. Autograd hooks call `ready`.
    """

    @abstractmethod
    def begin(self, small: Callable[[Gradients], None] | None = None) -> None:
        """Forget the gradients of the step before, ahead of the first backward pass.

        `small` receives the gradients of each small batch before they are summed with others. On
        an axis of several ranks that is this rank's share of the batch, else each microbatch, part
        by part. Without it, measuring costs nothing.
        """

    @abstractmethod
    def last_microbatch(self, part: int | None = None) -> None:
        """Announce the last backward pass of `part` (None: of all): from now on complete gradients
        may start.
        """

    @abstractmethod
    def ready(self, parameter: nn.Parameter) -> None:
        """Take a gradient of one microbatch, which autograd has just added to `parameter.grad`."""

    @abstractmethod
    def microbatch_ended(self, part: int) -> None:
        """Note that one microbatch's gradients of `part` are complete."""

    def initialise(  # noqa: B027
        self,
        parts: Sequence[PartModule],
        seed: int,
        others: Container[nn.Parameter] = frozenset(),
    ) -> None:
        """Set the initial values of weights that have none before, but of `others`.

        Every rank of the axis calls it.
        """

    def optimizer_weights(
        self,
        weights: Mapping[str, nn.Parameter],
        values: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> Mapping[str, nn.Parameter]:
        """Return, by name, what the optimizer steps on once `finish` has filled its `grad`:
        `weights`, their float32 masters, or shards.

        `values`: the float32 values of `weights` of a lower dtype.
        """
        return weights

    @property
    def is_cut(self) -> bool:
        """Whether ranks of the axis hold different runs of the gradients and of what the optimizer
        steps on.
        """
        return False

    @property
    def gathered(self) -> PassWeights | None:
        """What gathers the weights while passes read them; None: each rank has them at any time."""
        return None

    def first_element(self, weight: nn.Parameter) -> int:
        """Return which element of `weight` is the first that the optimizer steps on here."""
        return 0

    @abstractmethod
    def updated(self) -> None:
        """Pass on to the weights what has changed in `optimizer_weights`, after each update."""

    @abstractmethod
    def gradient_of(self, parameter: nn.Parameter) -> Tensor:
        """Return the summed gradient of `parameter`, after `finish`."""

    @abstractmethod
    def finish(self) -> None:
        """Sum over the data axis, and fill `grad` of the optimizer's weights. Every rank of the
        axis calls it.
        """

    @abstractmethod
    def counted_gradients(
        self, replica: tuple[int, int], excluded: Collection[nn.Parameter] = ()
    ) -> list[Tensor]:
        """Return the pieces of gradients whose squares this rank adds to the norm.

        `replica` is (i, n): this rank is the i-th of n ranks that hold the same weights. Together
        their pieces cover each element once. `excluded`: parameters that count elsewhere.
        """

    @abstractmethod
    def scale_(self, factor: float) -> None:
        """Multiply all gradients by `factor`."""

    @abstractmethod
    def clamp_(self, limit: float) -> None:
        """Clamp each element of all gradients to ± `limit`."""

    @abstractmethod
    def describe(self) -> str:
        """Return how gradients are summed, for the plan that is printed."""

    @abstractmethod
    def close(self) -> None:
        """Free gradients, shared memory, communicators. Every rank of the axis calls it, last."""
