"""Interleaved 1F1B: each rank holds v stages that are p apart, and the bubble shrinks by v.

Narayanan et al., "Efficient large-scale language model training on GPU clusters using
Megatron-LM", 2021.
"""

from mpillm.parallel.pipeline.schedule_rule import ActionRow, ScheduleRule, split_rounds


def _fill_row(row: ActionRow, p: int, m: int, v: int, r: int) -> None:
    """Let the chunks take turns, a round of microbatches each, in the order of 1F1B."""
    # Megatron-LM's rounds hold p microbatches, and p divides m. Where it does not, rounds are
    # larger: no rank waits longer, and each stores a little more.
    sizes = split_rounds(p, m)
    turns = [chunk for size in sizes for chunk in range(v) for _ in range(size)]
    forwards, backwards = [f"F{chunk}" for chunk in turns], [f"B{v - 1 - chunk}" for chunk in turns]
    # Megatron-LM's warm-up: the last chunk of the first round begins after v − 1 chunks of that
    # round, and each later rank needs two forwards fewer before its first gradient arrives.
    ahead = min(m * v, 2 * (p - r - 1) + (v - 1) * sizes[0])
    row.add(1, *forwards[:ahead])
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        row.add(1, forward, backward)
    row.add(1, *backwards[m * v - ahead :])


# Fewer microbatches than ranks do not fill a round, and the ranks would wait for one another.
INTERLEAVED = ScheduleRule(_fill_row, chunks=2, more_chunks=True, microbatches_a_rank=1)
