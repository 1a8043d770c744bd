"""ZB-H1: 1F1B with the backward in halves; a third of its bubble, in the memory of its first rank.

Qi, Wan, Huang, Lin, "Zero bubble pipeline parallelism", 2023.
"""

from mpillm.parallel.pipeline.schedule_rule import ActionRow, ScheduleRule


def _fill_row(row: ActionRow, p: int, m: int, v: int, r: int) -> None:
    """Append the order of 1F1B, with W delayed by r microbatches after its I."""
    ahead = min(m, p - r)
    row.add(ahead, "F0")
    for microbatch in range(m):
        # Later ranks keep more W for the end, where 1F1B leaves them idle.
        row.add(
            1,
            "I0",
            *(["W"] if microbatch >= r else []),
            *(["F0"] if microbatch < m - ahead else []),
        )
    row.add(min(m, r), "W")


ZB_H1 = ScheduleRule(_fill_row)
