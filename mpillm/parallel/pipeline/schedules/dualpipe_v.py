"""DualPipe-V: two stages a rank in a V; whole backwards, with halves at the start and the end only.

DeepSeek-AI, "DeepSeek-V3 technical report", 2024, whose DualPipe they cut in half in 2025.
"""

from mpillm.parallel.pipeline.schedule_rule import ActionRow, ScheduleRule


def _fill_row(row: ActionRow, p: int, m: int, v: int, r: int) -> None:
    """Append the phases of DualPipe-V; chunk 0 goes down the V, chunk 1 back up."""
    # Warm-up: until the first microbatch has come back up to this rank.
    row.add(2 * (p - r - 1), "F0")
    row.add(r + 1, "F0", "F1")
    row.add(p - r - 1, "I1", "W", "F1")
    # Steady state. DeepSeek runs a forward and a backward at the same time, here one follows the
    # other.
    row.add(m - 2 * p + r + 1, "F0", "B1", "F1", "B0")
    row.add(p - r - 1, "B1", "F1", "B0")
    # Cool-down: whole backwards, then halves. The W of the halves fill the waits at the end.
    pairs = ["B1", "B0"] * (r + 1)
    row.add(1, *pairs[: r + 1], *(cell.replace("B", "I") for cell in pairs[r + 1 :]))
    row.add(p - r - 1, "W", "I0")
    row.add(r + 1, "W")


# With fewer microbatches than stages the warm-up would not fill the V.
DUALPIPE_V = ScheduleRule(_fill_row, chunks=2, v_shape=True, microbatches_a_rank=2)
