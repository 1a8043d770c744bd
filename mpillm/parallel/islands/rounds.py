"""When islands train alone, and when a round of theirs ends: plain numbers.

Up to step `island_from` all islands sum their gradients, as one data axis. From then on each one
trains alone. A round ends after every `island_every` steps, and after the last step of the run.
"""

from dataclasses import dataclass

from mpillm.errors import RecipeError
from mpillm.parallel.settings import ParallelSettings


@dataclass(frozen=True)
class IslandRounds:
    """The rounds of a run of `steps` steps. Steps are counted by how many are done before."""

    every: int
    first: int
    """The number of steps that are done when the first round begins."""
    steps: int

    @classmethod
    def of(cls, settings: ParallelSettings, steps: int) -> "IslandRounds":
        return cls(settings.island_every, settings.island_from, steps)

    def apart(self, done: int) -> bool:
        """Return whether each island computes the step after `done` steps alone."""
        return done >= self.first

    def ends(self, done: int) -> bool:
        """Return whether a round ends once `done` steps are done."""
        return done > self.first and ((done - self.first) % self.every == 0 or done == self.steps)

    def open(self, done: int) -> bool:
        """Return whether a round has begun and not ended: the islands' weights differ."""
        return done > self.first and not self.ends(done)


def check_rounds(settings: ParallelSettings, evaluate_every: int, save_every: int) -> None:
    """Raise RecipeError where an evaluation or a save would come within a round.

    There are no common weights then: those of the last round are older than the step.
    """
    every = settings.island_every
    if settings.island == 1:
        return
    asked = {
        "parallel.island_from": settings.island_from,
        "train.evaluate_every": evaluate_every,
        "train.save_every": save_every,
    }
    for name, steps in asked.items():
        if steps % every:
            below, above = steps // every * every, (steps // every + 1) * every
            nearest = f"{below} or {above}" if below else f"{above}"
            raise RecipeError(
                f"{name} = {steps} must be a multiple of parallel.island_every = {every}: islands "
                f"have common weights at the end of a round alone; take {nearest}, or another "
                "island_every"
            )
