"""What one rank does in each pipeline schedule, in a few lines: which actions, how often, in which order.

- gpipe: Huang et al., "GPipe: Efficient training of giant neural networks using pipeline parallelism" (2019).
- 1f1b: Narayanan et al., "PipeDream: Generalized pipeline parallelism for DNN training" (2019), with the flush of
  their "Memory-efficient pipeline-parallel DNN training" (2021).
- interleaved: Narayanan et al., "Efficient large-scale language model training on GPU clusters using Megatron-LM"
  (2021).
- zb-h1: Qi, Wan, Huang, Lin, "Zero bubble pipeline parallelism" (2023). zb-v: there, and in Qi et al., "Pipeline
  parallelism with controllable memory" (2024).
- dualpipe-v: DeepSeek's DualPipe ("DeepSeek-V3 technical report", 2024), cut in half as they published it in 2025.

In each, p ranks, m microbatches, v chunks (stages) a rank, r the rank.
"""

from collections import Counter, deque
from typing import cast

from mpillm.parallel.pipeline.actions import Action, Kind


class ActionRow:
    """A rank's row as it grows. It counts microbatches: the next forward of a stage is that of the next microbatch."""

    def __init__(self, stages: list[int]) -> None:
        """`stages`: of the rank's chunks 0, 1, …"""
        self.actions: list[Action] = []
        self._stages = stages
        self._forwards: Counter[int] = Counter()
        self._backwards: Counter[int] = Counter()
        self._owed: deque[Action] = deque()

    def add(self, times: int, *cells: str) -> None:
        """`times` times these: F0, the forward of chunk 0; B1, I1; W, the half that some I has owed for longest."""
        for cell in cells * times:
            if cell == "W":
                self.actions.append(self._owed.popleft())
                continue
            kind, stage = cast("Kind", cell[0]), self._stages[int(cell[1:])]
            count = self._forwards if kind == "F" else self._backwards
            self.actions.append(Action(stage, kind, count[stage]))
            if kind == "I":
                self._owed.append(Action(stage, "W", count[stage]))
            count[stage] += 1


def gpipe(row: ActionRow, p: int, m: int, v: int, r: int) -> None:
    row.add(m, "F0")
    row.add(m, "B0")


def one_f_one_b(row: ActionRow, p: int, m: int, v: int, r: int) -> None:
    ahead = min(m, p - r)
    row.add(ahead, "F0")
    row.add(m - ahead, "B0", "F0")
    row.add(ahead, "B0")


def interleaved(row: ActionRow, p: int, m: int, v: int, r: int) -> None:
    """Chunks take turns, a round of microbatches each. Rounds of p are Megatron's; larger ones take in the rest where
    p does not divide m, so that no rank waits longer, and store a little more.
    """
    sizes = rounds(p, m)
    turns = [chunk for size in sizes for chunk in range(v) for _ in range(size)]
    forwards, backwards = [f"F{chunk}" for chunk in turns], [f"B{v - 1 - chunk}" for chunk in turns]
    ahead = min(m * v, 2 * (p - r - 1) + (v - 1) * sizes[0])
    row.add(1, *forwards[:ahead])
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        row.add(1, forward, backward)
    row.add(1, *backwards[m * v - ahead :])


def zb_h1(row: ActionRow, p: int, m: int, v: int, r: int) -> None:
    """As 1F1B, but a weights' half comes r microbatches after its I: later ranks have the more of them for the end."""
    ahead = min(m, p - r)
    row.add(ahead, "F0")
    for microbatch in range(m):
        row.add(
            1,
            "I0",
            *(["W"] if microbatch >= r else []),
            *(["F0"] if microbatch < m - ahead else []),
        )
    row.add(min(m, r), "W")


def zb_v(row: ActionRow, p: int, m: int, v: int, r: int) -> None:
    row.add(2 * (p - r) - 1, "F0")
    row.add(r, "F1", "F0")
    row.add(p - r, "F1", "I1", "W")
    row.add(m - 2 * p + r + 1, "F0", "I0", "W", "F1", "I1", "W")
    row.add(p - r - 1, "I0", "W", "F1", "I1", "W")
    row.add(r, "I0", "I1")
    row.add(p - r, "I0", "W")
    row.add(2 * r, "W")


def dualpipe_v(row: ActionRow, p: int, m: int, v: int, r: int) -> None:
    row.add(2 * (p - r - 1), "F0")
    row.add(r + 1, "F0", "F1")
    row.add(p - r - 1, "I1", "W", "F1")
    row.add(m - 2 * p + r + 1, "F0", "B1", "F1", "B0")
    row.add(p - r - 1, "B1", "F1", "B0")
    pairs = ["B1", "B0"] * (r + 1)
    row.add(1, *pairs[: r + 1], *(cell.replace("B", "I") for cell in pairs[r + 1 :]))
    row.add(p - r - 1, "W", "I0")
    row.add(r + 1, "W")


def rounds(ranks: int, microbatches: int) -> list[int]:
    """Microbatches cut into rounds, as even as can be, each of at least `ranks`: fewer would leave a rank waiting."""
    count = max(1, microbatches // ranks)
    return [microbatches // count + (number < microbatches % count) for number in range(count)]
