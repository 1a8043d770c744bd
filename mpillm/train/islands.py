"""Islands in a run: what they add to a step, and the names of their state in a checkpoint.

    optimizer/outer_momentum/NAME     the outer momentum of a weight
    optimizer/island-2/SLOT/NAME      the optimizer's state on island 2; island 0 has no number
    optimizer/island-2/weight/NAME    the weights of island 2 within a round

Where a round is open, `model/NAME` holds the common weights of its beginning.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mpillm.comm.mesh import Mesh
from mpillm.machine.cluster_profile import ClusterProfile
from mpillm.parallel.islands.outer_step import OuterStep
from mpillm.parallel.islands.rounds import IslandRounds
from mpillm.train.recipe import Recipe
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.names import name_tensors
from mpillm.weights.slices import Held

OUTER, OWN = "outer_momentum", "weight"
STATE = "optimizer/"


class Islands:
    """The islands of a run, as one rank takes part. Every rank makes it, and calls its methods
    together with the others.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        stepped: Mapping[str, Any],
        profile: ClusterProfile | None,
        warn: Callable[[str], None],
        held: Callable[[str, Tensor], Held],
    ) -> None:
        """`held`: what a tensor of the shape of a stepped weight is of the whole one."""
        axis = mesh.axis("island")
        self.count, self._number = axis.size, axis.rank
        self.rounds = IslandRounds.of(recipe.parallel, recipe.train.steps)
        self._stepped, self._axis, self._held = stepped, axis, held
        self._outer = OuterStep(stepped, axis, recipe.parallel, profile, warn)

    def parts(self, done: int) -> int:
        """Return in how many parts the batch after `done` steps is trained: 1, or the islands."""
        return self.count if self.rounds.apart(done) else 1

    def begin_step(self, done: int) -> None:
        """Begin the first round where it is due, ahead of the step after `done` steps."""
        if self.rounds.apart(done) and not self._outer.common:
            self._outer.begin()

    def summing(self, done: int) -> Callable[[Sequence[Tensor]], None] | None:
        """Return what sums the gradients of the step after `done` steps over the islands; None
        where each island trains alone.
        """
        return None if self.rounds.apart(done) else self._outer.sum_gradients

    def largest(self, norm: float) -> float:
        """Return the largest norm of the islands, NaN where one is: all ranks judge alike."""
        norms: list[float] = self._axis.comm.allgather(norm)
        return next((each for each in norms if math.isnan(each)), max(norms))

    def end_step(self, done: int) -> bool:
        """Close the round that ends once `done` steps are done; return whether one did."""
        if not self.rounds.ends(done):
            return False
        self._outer.close_round()
        return True

    def tensors(self, plain: Mapping[str, Any], done: int) -> dict[str, Any]:
        """Return what a checkpoint of `done` steps holds; `plain`: what it holds without islands.

        Before the first round all islands have the same state.
        """
        if not self._outer.common:
            return dict(plain)
        found = {self._name(name): held for name, held in plain.items()}
        found |= self._state(OUTER, self._outer.momentum)
        if self.rounds.open(done):
            found |= name_tensors(self._outer.common, {}, {}, (), self._held)
            own = self._state(OWN, self._stepped)
            found |= {self._name(name, 0): held for name, held in own.items()}
        return found

    def _state(self, slot: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Name `values`, by weight, as the optimizer's state `slot`."""
        state = {self._stepped[name]: {slot: value} for name, value in values.items()}
        stepped = {name: self._stepped[name] for name in values}
        return name_tensors({}, stepped, state, (slot,), self._held)

    def _name(self, name: str, first: int = 1) -> str:
        """Give the optimizer's state the number of the island, from island `first` on."""
        if self._number < first or not name.startswith(STATE):
            return name
        return f"{STATE}island-{self._number}/{name.removeprefix(STATE)}"

    def load(self, checkpoint: Checkpoint, plain: Mapping[str, Any]) -> None:
        """Fill `plain`, and the islands' own state, from a checkpoint.

        An island whose own state is not stored takes that of island 0, or the common weights.
        """
        done, stored = checkpoint.step, checkpoint.tensors
        if not self.rounds.apart(done):
            checkpoint.load(plain)
            return
        self._outer.begin()
        wanted = self.tensors(plain, done)
        own = f"{STATE}island-{self._number}/"
        found: dict[str, Any] = {}
        for name, held in wanted.items():
            shared = name.replace(own, STATE, 1)
            if name in stored:
                found[name] = held
            elif shared in stored:
                found[shared] = held
            elif not name.startswith((f"{STATE}{OUTER}/", own)):
                # Its absence is an error, which names it.
                found[name] = held
        open_round = self.rounds.open(done)
        within = any(name.startswith(f"{own}{OWN}/") for name in found)
        checkpoint.load(found)
        if not open_round:
            self._outer.take_common()
        elif not within:
            self._outer.forget_round()
        self._outer.check_common()

    def close(self) -> None:
        """Free communicators; every rank calls it."""
        self._outer.close()
