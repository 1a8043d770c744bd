"""ZB-V: two stages a rank in a V, backward in halves; at equal costs a rank waits p − 1 forwards.

Qi, Wan, Huang, Lin, "Zero bubble pipeline parallelism", 2023, and Qi et al., "Pipeline parallelism
with controllable memory", 2024.
"""

from mpillm.parallel.pipeline.schedule_rule import ActionRow, ScheduleRule


def _fill_row(row: ActionRow, p: int, m: int, v: int, r: int) -> None:
    """Append the phases of ZB-V; chunk 0 goes down the V, chunk 1 back up."""
    # Warm-up: until the first microbatch has come back up to this rank.
    row.add(2 * (p - r) - 1, "F0")
    row.add(r, "F1", "F0")
    row.add(p - r, "F1", "I1", "W")
    # Steady state: both chunks forward and backward; each W follows its I at once.
    row.add(m - 2 * p + r + 1, "F0", "I0", "W", "F1", "I1", "W")
    row.add(p - r - 1, "I0", "W", "F1", "I1", "W")
    # Cool-down: rank r keeps 2r weight halves, so that its input halves leave without waiting.
    row.add(r, "I0", "I1")
    row.add(p - r, "I0", "W")
    row.add(2 * r, "W")


# With fewer microbatches than stages the warm-up would not fill the V.
ZB_V = ScheduleRule(_fill_row, chunks=2, v_shape=True, microbatches_a_rank=2)
