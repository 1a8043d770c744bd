"""A toy pipeline schedule: 1F1B with split backwards, each W right after its I."""

from mpillm.parallel.pipeline.schedule_rule import ActionRow, ScheduleRule


def _fill_row(row: ActionRow, p: int, m: int, v: int, r: int) -> None:
    ahead = min(m, p - r)
    row.add(ahead, "F0")
    row.add(m - ahead, "I0", "W", "F0")
    row.add(ahead, "I0", "W")


Hurried = ScheduleRule(_fill_row)
