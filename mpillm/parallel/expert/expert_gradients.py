"""Gradients where ranks own different experts: those of experts over their owners, others over all.

Each of the two is a GradientSync of its own, replicated or in shards.
"""

from collections.abc import Callable, Collection, Container, Mapping, Sequence

from torch import Tensor, nn

from mpillm.models.part_module import PartModule
from mpillm.parallel.data.gradient_sync import Gradients, GradientSync, PassWeights


class ExpertGradients(GradientSync):
    """`dense`: of the weights that all ranks hold. `experts`: of the weights `own`, which have
    values.
    """

    def __init__(
        self,
        dense: GradientSync,
        experts: GradientSync,
        own: Container[nn.Parameter],
        replica: tuple[int, int],
    ) -> None:
        """`replica`: (i, n), this rank is the i-th of n ranks that hold the same experts."""
        self._dense, self._experts = dense, experts
        self._own, self._replica = own, replica

    def _of(self, parameter: nn.Parameter) -> GradientSync:
        return self._experts if parameter in self._own else self._dense

    def begin(self, small: Callable[[Gradients], None] | None = None) -> None:
        assert small is None, "an expert's gradient is of several ranks: noise_scale is refused"
        self._dense.begin()
        self._experts.begin()

    def last_microbatch(self, part: int | None = None) -> None:
        self._dense.last_microbatch(part)
        self._experts.last_microbatch(part)

    def ready(self, parameter: nn.Parameter) -> None:
        self._of(parameter).ready(parameter)

    def microbatch_ended(self, part: int) -> None:
        self._dense.microbatch_ended(part)
        self._experts.microbatch_ended(part)

    def initialise(
        self,
        parts: Sequence[PartModule],
        seed: int,
        others: Container[nn.Parameter] = frozenset(),
    ) -> None:
        self._dense.initialise(parts, seed, self._own)

    def optimizer_weights(
        self,
        weights: Mapping[str, nn.Parameter],
        values: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> Mapping[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for sync in (self._dense, self._experts):
            own = {name: weight for name, weight in weights.items() if self._of(weight) is sync}
            theirs = {w: value for w, value in (values or {}).items() if self._of(w) is sync}
            found |= sync.optimizer_weights(own, theirs)
        # In the order of the model.
        return {name: found[name] for name in weights if name in found}

    @property
    def is_cut(self) -> bool:
        return self._dense.is_cut

    @property
    def gathered(self) -> PassWeights | None:
        return self._dense.gathered

    def first_element(self, weight: nn.Parameter) -> int:
        return self._of(weight).first_element(weight)

    def updated(self) -> None:
        self._dense.updated()
        self._experts.updated()

    def gradient_of(self, parameter: nn.Parameter) -> Tensor:
        return self._of(parameter).gradient_of(parameter)

    def finish(self) -> None:
        self._dense.finish()
        self._experts.finish()

    def counted_gradients(
        self, replica: tuple[int, int], excluded: Collection[nn.Parameter] = ()
    ) -> list[Tensor]:
        """`replica`: of the weights that all ranks hold."""
        dense = self._dense.counted_gradients(replica, excluded)
        return dense + self._experts.counted_gradients(self._replica, excluded)

    def scale_(self, factor: float) -> None:
        self._dense.scale_(factor)
        self._experts.scale_(factor)

    def clamp_(self, limit: float) -> None:
        self._dense.clamp_(limit)
        self._experts.clamp_(limit)

    def describe(self) -> str:
        return f"{self._dense.describe()}; of experts {self._experts.describe()}"

    def close(self) -> None:
        self._dense.close()
        self._experts.close()
