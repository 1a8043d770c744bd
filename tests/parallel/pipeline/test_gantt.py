"""Charts, read back from their lines and files."""

import re

import pytest
from mpi4py import MPI

from mpillm.errors import UsageError
from mpillm.parallel.pipeline.gantt import gantt_picture, gantt_text
from mpillm.parallel.pipeline.schedule_catalog import SCHEDULES, make_schedule
from mpillm.parallel.pipeline.simulate import Costs, simulate


def chart(name, ranks, microbatches, width, chunks=0, **costs):
    schedule = make_schedule(name, ranks, microbatches, chunks)
    return gantt_text(simulate(schedule, Costs.even(schedule.stages, **costs)), schedule, width)


def ranks_of(lines):
    return [line.plain for line in lines if re.match(r"rank \d", line.plain)]


def test_to_scale_with_the_microbatch_in_each_cell():
    lines = chart("1f1b", 2, 3, 80)
    assert [line.plain for line in lines] == [
        "F forward  B backward  number: microbatch  · waits",
        "rank 0 F0 F1 ······B0    F2 B1    ···B2    ",
        "rank 1 ···F0 B0    F1 B1    F2 B2    ······",
        "time   0              5              10",
    ]


def test_it_closes_up_before_it_drops_the_numbers():
    spaced, close, compressed = (ranks_of(chart("1f1b", 2, 3, width)) for width in (43, 42, 30))
    assert spaced[0] == "rank 0 F0 F1 ······B0    F2 B1    ···B2    "
    assert close[0] == "rank 0 F0F1····B0  F2B1  ··B2  "
    assert len(compressed[0]) <= 30
    assert set(compressed[0].removeprefix("rank 0 ")) == set("FB·")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("width", [1, 40, 80, 200])
def test_no_line_is_wider_than_it_may_be_and_all_ranks_are_as_long(name, width):
    lines = chart(name, 4, 9, width, transfer=0.3, backward_input=1.7)
    assert len({len(line) for line in ranks_of(lines)}) == 1
    assert max(map(len, ranks_of(lines))) <= max(width, len("rank 0 ") + 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_is_in_its_place(name):
    """Each label is in the column of its begin, in the colour of its kind and chunk."""
    schedule = make_schedule(name, 3, 6)
    timeline = simulate(schedule, Costs.even(schedule.stages, backward_weight=2))
    lines = gantt_text(timeline, schedule, 1000)[1:-1]
    styles = {}
    for line, spans in zip(lines, timeline.spans, strict=True):
        columns = (len(line.plain) - 7) / timeline.makespan
        for span in spans:
            chunk = schedule.chunk_of[span.action.stage]
            label = f"{span.action.kind}{span.action.microbatch}"
            at = 7 + round(span.begin * columns)
            assert line.plain[at:].startswith(label.lower() if chunk else label)
            drawn = next(part.style for part in line.spans if part.start <= at < part.end)
            assert styles.setdefault((span.action.kind, chunk), drawn) == drawn
    assert len(set(styles.values())) == len(styles)


def test_a_compressed_column_has_the_letter_of_its_middle():
    schedule = make_schedule("interleaved", 2, 16, 4)
    timeline = simulate(schedule, Costs.even(8))
    lines = ranks_of(gantt_text(timeline, schedule, 107))
    for line, spans in zip(lines, timeline.spans, strict=True):
        for column, drawn in enumerate(line[7:]):
            middle = (column + 0.5) * timeline.makespan / 100
            now = [span.action for span in spans if span.begin <= middle < span.end]
            assert drawn == (now[0].kind if now else "·") or drawn == now[0].kind.lower()
            assert not now or drawn.islower() == (now[0].stage // 2 in (1, 3))


def test_small_letters_are_explained():
    assert "small letters: chunk 1" in chart("zb-v", 2, 4, 200)[0].plain
    assert "small letters" not in chart("zb-h1", 2, 4, 200)[0].plain
    assert "a column: 1.19 of time" in chart("gpipe", 2, 16, 50)[0].plain


def test_costless_actions_are_not_drawn():
    line = ranks_of(chart("1f1b", 1, 2, 80, forward=0))[0]
    assert re.fullmatch(r"rank 0 B0 +B1 *", line)


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_pictures(folder, kind):
    path = folder / f"chart-{MPI.COMM_WORLD.rank}.{kind}"
    schedule = make_schedule("dualpipe-v", 2, 4)
    gantt_picture(simulate(schedule, Costs.even(4)), schedule, path)
    written = path.read_bytes()
    assert written.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    if kind == "svg":
        text = written.decode()
        assert "dualpipe-v: 2 ranks, 4 stages, 4 microbatches, bubble" in text
        assert "backward of the weights, chunk 1" in text
        for colour in ("#7aa2f7", "#73c882", "#5acdcd", "#f0be5a"):
            assert colour in text.lower()


def test_a_picture_of_another_kind(folder):
    schedule = make_schedule("1f1b", 2, 2)
    with pytest.raises(UsageError, match=r"as \.svg or \.png, not as chart\.pdf"):
        gantt_picture(simulate(schedule, Costs.even(2)), schedule, folder / "chart.pdf")
    assert not (folder / "chart.pdf").exists()
