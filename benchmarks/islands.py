"""Compare runs of islands with data parallel, as islands.sh leaves them.

    python benchmarks/islands.py FOLDER

Loss at equal tokens: the validation loss after the last step. Loss at equal time: the lowest
validation loss of a run up to the time at which the fastest of the others ended. Time is the sum of
the seconds of the steps: evaluations and saves do not count.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpillm.runs.folder import METRICS
from mpillm.system.console import Console

PLAIN, ALONE = "data-parallel", "alone"


@dataclass(frozen=True)
class Curve:
    """A run: (seconds, validation loss) of each evaluation, and tokens a second by step."""

    name: str
    losses: tuple[tuple[float, float], ...]
    speeds: tuple[float, ...]

    @classmethod
    def read(cls, folder: Path) -> "Curve":
        seconds, losses, speeds = 0.0, [], []
        for text in (folder / METRICS).read_text().splitlines():
            line = json.loads(text)
            if "validation_loss" in line:
                losses.append((seconds, line["validation_loss"]))
            else:
                seconds += line["step_seconds"]
                speeds.append(line["tokens_per_second"])
        return cls(folder.name, tuple(losses), tuple(speeds))

    @property
    def seconds(self) -> float:
        return self.losses[-1][0]

    def loss_at(self, seconds: float) -> float | None:
        """Return the loss of the last evaluation by then; None before the first."""
        found = [loss for when, loss in self.losses if when <= seconds]
        return found[-1] if found else None

    def speed(self, last: float = 0.5) -> float:
        """Return the mean tokens a second of the last part of the steps: rounds included."""
        count = max(1, int(len(self.speeds) * last))
        return statistics.harmonic_mean(self.speeds[-count:])


def rows(curves: Sequence[Curve]) -> list[list[str]]:
    by_name = {curve.name: curve for curve in curves}
    plain, alone = by_name[PLAIN], by_name.get(ALONE)
    shortest = min(curve.seconds for curve in curves if curve.name != ALONE)
    found = []
    for curve in sorted(curves, key=lambda each: each.losses[-1][1]):
        loss, early = curve.losses[-1][1], curve.loss_at(shortest)
        found.append(
            [
                curve.name,
                f"{loss:.4f}",
                f"{loss / plain.losses[-1][1] - 1:+.2%}",
                "-" if early is None else f"{early:.4f}",
                f"{curve.seconds:,.0f}",
                f"{curve.speed():,.0f}",
                "-" if alone is None else f"{curve.speed() / alone.speed():.3f}",
            ]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    curves = [Curve.read(path.parent) for path in sorted(folder.glob(f"*/{METRICS}"))]
    columns = [
        "run",
        "loss",
        "to data parallel",
        "at equal time",
        "seconds",
        "tokens/s",
        "to alone",
    ]
    Console().table("islands", columns, rows(curves))


if __name__ == "__main__":
    main()
