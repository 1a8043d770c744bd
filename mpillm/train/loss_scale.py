"""The dynamic loss scale of float16 (Micikevicius et al. 2018, "Mixed precision training", 3.2).

float16 ends at 6e-8, and many gradients are smaller. The loss is multiplied by a scale, so all
gradients are, and they are divided by it before the update. Where they overflow, the scale was too
large: the step is computed again with half of it. After many steps without an overflow it doubles.
Scales are powers of two, which change no bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIRST, LARGEST = 2.0**16, 2.0**24
# As in torch.amp.GradScaler: rarely enough that repeated steps cost 1 in 2,000.
GROWTH_STEPS = 2000


@dataclass
class LossScale:
    """The scale, the same on every rank. 1 and fixed where nothing is scaled."""

    value: float = 1.0
    dynamic: bool = False
    since_change: int = 0
    """Steps since the scale changed or an overflow came."""

    @classmethod
    def make(cls, dynamic: bool) -> "LossScale":
        return cls(FIRST, True) if dynamic else cls()

    def lower(self) -> bool:
        """Halve the scale after an overflow; False where it cannot help: it is 1 already."""
        if not self.dynamic or self.value <= 1.0:
            return False
        self.value, self.since_change = self.value / 2, 0
        return True

    def step_taken(self) -> None:
        """Count a step without overflow; double the scale after GROWTH_STEPS of them."""
        if not self.dynamic:
            return
        self.since_change += 1
        if self.since_change >= GROWTH_STEPS:
            self.value, self.since_change = min(2 * self.value, LARGEST), 0

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint records, so that a resumed run has the same scale."""
        return {"loss_scale": [self.value, self.since_change]} if self.dynamic else {}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take the scale of a checkpoint; one that has none, or a damaged one, starts at FIRST."""
        recorded = facts.get("loss_scale")
        if not self.dynamic or not isinstance(recorded, list) or len(recorded) != 2:
            return
        value, since = recorded
        if type(value) is float and type(since) is int and 1.0 <= value <= LARGEST and since >= 0:
            self.value, self.since_change = value, since
