"""GPipe: all forwards, then all backwards; each rank stores the activations of every microbatch.

Huang et al., "GPipe: Efficient training of giant neural networks using pipeline parallelism", 2019.
"""

from mpillm.parallel.pipeline.schedule_rule import ActionRow, ScheduleRule


def _fill_row(row: ActionRow, p: int, m: int, v: int, r: int) -> None:
    """Append the forwards of all microbatches, then the backwards."""
    row.add(m, "F0")
    row.add(m, "B0")


GPIPE = ScheduleRule(_fill_row)
