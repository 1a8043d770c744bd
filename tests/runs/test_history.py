"""A run's history, read back: attempts in their order, however each of them ended."""

import json
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.errors import UsageError
from mpillm.runs.folder import HISTORY, OUTCOME
from mpillm.runs.history import (
    Event,
    HistoryWriter,
    attempts,
    last_save_seconds,
    read_history,
    read_history_log,
)

NOON = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
START = {
    "ranks": 2,
    "hosts": {"n1": [0], "n2": [1]},
    "job": {"scheduler": "slurm", "id": "7", "restart": 1},
}


def event(name: str, minute: float, step: int, **facts: object) -> Event:
    return Event(name, NOON + timedelta(minutes=minute), step, facts)


STORY = [
    event("started", 0, 0, **START),
    event("saved", 4, 40, checkpoint="checkpoints/step-00000040", seconds=1.5),
    event("stopped", 5, 50, reason="SIGUSR1 on rank 1"),
    event("started", 10, 50, job=None),
    event("saved", 12, 70),
    event("saved", 14, 90),
    event("started", 20, 90),
    event("failed", 21, 95, reason="the cable burnt"),
    event("started", 30, 90),
]


def test_each_attempt_is_told_with_its_end() -> None:
    found = attempts([*STORY, event("finished", 40, 200)])
    assert [attempt.how for attempt in found] == ["stopped", "killed", "failed", "finished"]
    assert [(attempt.number, attempt.first_step, attempt.last_step) for attempt in found] == [
        (1, 0, 50),
        (2, 50, 90),
        (3, 90, 95),
        (4, 90, 200),
    ]
    assert [attempt.reason for attempt in found] == ["SIGUSR1 on rank 1", "", "the cable burnt", ""]
    assert [attempt.seconds for attempt in found] == [300, 240, 60, 600]
    assert [len(attempt.saved) for attempt in found] == [1, 2, 0, 0]
    assert found[0].hosts == {"n1": [0], "n2": [1]}
    assert found[0].job["id"] == "7"
    assert (found[1].hosts, found[1].job) == ({}, {})


def test_an_open_end_is_a_run_at_work_or_one_that_was_killed() -> None:
    later = NOON + timedelta(minutes=45)
    running = attempts(STORY, alive=True, now=later, reached=170)[-1]
    assert (running.how, running.last_step, running.seconds) == ("running", 170, 900)
    killed = attempts(STORY, alive=False, now=later, reached=170)[-1]
    assert (killed.how, killed.last_step, killed.seconds) == ("killed", 170, 900)
    # The metrics are those of the last attempt alone; an earlier trace does not count for it.
    assert attempts(STORY, now=NOON, reached=170)[1].last_step == 90
    assert attempts(STORY, now=NOON, reached=170)[-1].seconds == 0
    assert attempts([], alive=True) == []
    assert attempts([event("saved", 0, 1), event("finished", 1, 2)]) == []


def test_what_the_diary_writes_is_read(tmp_path: Path) -> None:
    diary = HistoryWriter(tmp_path, writes=True)
    diary.started(0, START)
    diary.saved(5, tmp_path / "checkpoints/step-00000005", 0.5, 1234)
    diary.ended("stopped", 6, "the time limit is near")
    with (tmp_path / HISTORY).open("a") as file:
        file.write('{"event": "started", "ti')  # a node was lost while it wrote
    diary.started(5, START)
    diary.ended("finished", 9)
    first, second = attempts(read_history(tmp_path / HISTORY))
    assert (first.how, first.reason, first.facts["ranks"]) == (
        "stopped",
        "the time limit is near",
        2,
    )
    assert [saved.facts["checkpoint"] for saved in first.saved] == ["checkpoints/step-00000005"]
    assert (second.how, second.first_step, second.last_step) == ("finished", 5, 9)
    assert abs((datetime.now(UTC) - second.ended).total_seconds()) < 3600
    assert read_history(tmp_path / "none.jsonl") == []


def lines() -> list[str]:
    return [
        json.dumps(
            {
                "event": e.name,
                "time": e.time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "step": e.step,
                **e.facts,
            }
        )
        for e in STORY
    ]


@given(st.integers(0, 2000))
def test_a_history_cut_anywhere_is_read_up_to_there(cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, HISTORY)
        data = "\n".join(lines()).encode()[:cut]
        path.write_bytes(data)
        found = read_history(path)
    assert [e.name for e in found] == [e.name for e in STORY][: len(found)]
    assert len(found) in (data.count(b"\n"), data.count(b"\n") + 1)


def test_lines_that_tell_nothing_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / HISTORY
    odd = [
        "[]",
        "7",
        "{}",
        '{"event": "started", "time": "once upon a time", "step": 0}',
        "\x00\x00",
        "é\udcff",
        "",
    ]
    text = "\n".join([*odd, *lines(), *odd])
    path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    assert [e.name for e in read_history(path)] == [e.name for e in STORY]


def test_what_is_damaged_is_counted(tmp_path: Path) -> None:
    path = tmp_path / HISTORY
    odd = [
        '{"event": 3, "time": "2026-11-26T12:00:00+00:00", "step": 0}',
        '{"event": "saved", "time": 5, "step": 0}',
        '{"event": "saved", "time": "0001-01-01T00:00:00+14:00", "step": 0}',
        '{"event": "saved", "time": "2026-11-26T12:00:00+00:00", "step": [1]}',
        '{"event": "saved", "time": "2026-11-26T12:00:00+00:00", "step": 1e400}',
    ]
    path.write_text("\n".join([*odd, *lines()]))
    events, log = read_history_log(path)
    assert ([e.name for e in events], log.faults) == ([e.name for e in STORY], len(odd))
    assert log.note(HISTORY) == "5 lines of history.jsonl cannot be read"


def test_facts_of_odd_types_do_no_harm() -> None:
    odd = {"ranks": "x", "hosts": {"n1": 3, "n2": [0, "a", -1]}, "job": [], "deadline": "soon"}
    (found,) = attempts([event("started", 0, 0, **odd)])
    assert (found.ranks, found.hosts, found.job) == (None, {"n2": [0]}, {})


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    HistoryWriter(tmp_path, writes=True).started(0, {"deadline": float("nan")})
    (line,) = (tmp_path / HISTORY).read_text().splitlines()
    assert json.loads(line, parse_constant=lambda _: 1 / 0)["deadline"] is None


def test_a_history_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    for name in (HISTORY, OUTCOME):
        (tmp_path / name).mkdir()
        diary = HistoryWriter(tmp_path, writes=True)
        with pytest.raises(UsageError, match=rf"cannot write .*{name}.*; move it away"):
            diary.started(0, START)
        (tmp_path / name).rmdir()
    (tmp_path / HISTORY).unlink()
    (tmp_path / HISTORY).mkdir()
    # The outcome, by which batch scripts decide, is written all the same.
    with pytest.raises(OSError, match="Is a directory"):
        HistoryWriter(tmp_path, writes=True).ended("finished", 3)
    assert (tmp_path / OUTCOME).read_text() == "finished\n"


def test_the_duration_of_a_save_that_is_none(tmp_path: Path) -> None:
    diary = HistoryWriter(tmp_path, writes=True)
    diary.saved(1, tmp_path / "checkpoints/step-00000001", 2.5, 10)
    for odd in ('"x"', "NaN", "1e300", "true", "-1"):
        with (tmp_path / HISTORY).open("a") as file:
            head = '{"event": "saved", "time": "2026-11-26T12:00:00Z", "step": 2, "seconds": '
            file.write(f"{head}{odd}}}\n")
    assert last_save_seconds(tmp_path) == 2.5
