"""1F1B: one forward and one backward take turns as soon as a backward can begin.

Narayanan et al., "PipeDream: Generalized pipeline parallelism for DNN training", 2019, with the
flush of their "Memory-efficient pipeline-parallel DNN training", 2021.
"""

from mpillm.parallel.pipeline.schedule_rule import ActionRow, ScheduleRule


def _fill_row(row: ActionRow, p: int, m: int, v: int, r: int) -> None:
    """Append p − r forwards, then a backward and a forward in turn, then the other backwards."""
    # The first gradient reaches rank r when p − r forwards of it and the later ranks are done.
    # Fewer would leave the rank idle; more would store activations that nothing waits for.
    ahead = min(m, p - r)
    row.add(ahead, "F0")
    row.add(m - ahead, "B0", "F0")
    row.add(ahead, "B0")


ONE_F_ONE_B = ScheduleRule(_fill_row)
