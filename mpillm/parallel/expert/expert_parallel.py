"""Experts shared out among ranks: each computes its own for the tokens of all ranks of its group.

    rank of the axis    0    1    2    3          groups of 2, 8 experts
    experts of a group  0–3  4–7  0–3  4–7        ranks 0 and 2 own the same

Each mixture of a part keeps the experts that the rank owns. Their weights have the names of the
whole model, and their gradients are summed over the ranks that own the same.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mpillm.comm.communicator import silent
from mpillm.comm.mesh import Axis
from mpillm.comm.selection import Profile
from mpillm.models.layers.mixture import Mixture
from mpillm.models.part_module import PartModule
from mpillm.parallel.exchanged import exchanged
from mpillm.parallel.expert.expert_groups import own_experts
from mpillm.parallel.expert.token_exchange import TokenExchange

if TYPE_CHECKING:
    from mpi4py import MPI

# The names of experts' weights hold it: those of the shared expert do not.
EXPERTS = ".experts."


class ExpertParallel:
    """Groups of `size` neighbours on `tokens`, the axis of the ranks that share the tokens of a
    batch. Every rank of it makes it.
    """

    def __init__(
        self,
        tokens: Axis,
        size: int,
        experts: int,
        *,
        profile: Profile | None = None,
        debug: bool = False,
        warn: Callable[[str], None] = silent,
    ) -> None:
        """`experts`: of each mixture; `size` divides them, and the ranks of `tokens`."""
        group, place = divmod(tokens.rank, size)
        members = range(group * size, (group + 1) * size)
        self.group = _part(tokens, "experts", members)
        self.owners = _part(tokens, "owners of experts", range(place, tokens.size, size))
        """The ranks that own the same experts."""
        self.own = own_experts(experts, size, place)
        self.exchange = TokenExchange(self.group, experts, profile, debug, warn)
        self._weights: dict[nn.Parameter, str] = {}

    def __contains__(self, weight: object) -> bool:
        """Return whether `weight` is that of an expert."""
        return weight in self._weights

    def cut(self, part: PartModule) -> None:
        """Take the experts of other ranks out of `part`, whose weights have no values yet."""
        for module in part.modules():
            if isinstance(module, Mixture):
                for number in range(len(module.experts)):
                    if number not in self.own:
                        del module.experts[str(number)]
                module.begin_experts = self._begin
        self._weights |= {weight: name for name, weight in part.named_weights() if EXPERTS in name}

    def weights_of(self, part: PartModule) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weights of this rank's experts in `part`, by name."""
        return ((name, weight) for name, weight in part.named_weights() if weight in self)

    def _begin(self, mixture: Mixture, x_MC: Tensor, counts: list[int]) -> Callable[[], Tensor]:
        """Start to pass rows to their owners; the caller computes the shared expert meanwhile."""
        exchange = self.exchange
        routes = exchange.routes(counts)
        arriving = exchange.start_to_owners(x_MC, routes)

        there, back = (
            partial(pass_on, routes=routes) for pass_on in (exchange.to_owners, exchange.to_senders)
        )

        def finish() -> Tensor:
            # The rows are on their way.
            x_RC = exchanged(x_MC, lambda _: arriving(), back)
            y_RC = mixture.compute(x_RC, routes.counts_of(self.group.rank))
            return exchanged(y_RC, back, there)

        return finish

    def close(self) -> None:
        """Free memory and communicators. Every rank calls it."""
        self.exchange.close()
        for axis in (self.group, self.owners):
            axis.comm.Free()


def _part(axis: Axis, name: str, ranks: range) -> Axis:
    """Join the `ranks` of `axis`, this one among them. Every rank of the axis calls it."""
    comm: MPI.Intracomm = axis.comm.Split(ranks[0], axis.rank)  # type: ignore[assignment]
    node_map = None if axis.node_map is None else axis.node_map.of_ranks(ranks)
    return Axis(name, len(ranks), ranks.index(axis.rank), comm, node_map)
