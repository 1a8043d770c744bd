"""Logs are read as far as they can be, whatever became of them."""

import json
import math
import os
from pathlib import Path

import pytest

from mpillm.system import json_lines
from mpillm.system.json_lines import read_json_lines, real_number, whole_number

GOOD = b'{"a": 1}\n'


@pytest.mark.parametrize(
    ("damage", "read", "faults"),
    [
        (b"null\n", [], 1),
        (b"3\n", [], 1),
        (b"[1, 2]\n", [], 1),
        (b'"text"\n', [], 1),
        (b"{}\n", [{}], 0),
        (b"\n \r\n", [], 0),
        (b'{"a": 2, "b', [], 1),
        (b'{"a": 2}', [{"a": 2}], 0),
        (b'{"a": "\xff"}\n', [{"a": "\ufffd"}], 1),
        (b"\xff\xfe\n", [], 1),
        (b'\0\0\0\0{"a": 2}\n', [{"a": 2}], 1),
        (b"\0" * 4096, [], 1),
        (b'{"a": ' + b"9" * 5000 + b"}\n", [], 1),
        (b"[" * 100_000 + b"\n", [], 1),
        (b'{"a": "\\ud800"}\n', [{"a": "\ud800"}], 0),
    ],
)
def test_a_damaged_line_costs_itself_alone(
    tmp_path: Path, damage: bytes, read: list[object], faults: int
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(GOOD + damage)
    log = read_json_lines(path)
    assert [*log.objects] == [{"a": 1}, *read]
    assert (log.faults, log.failure) == (faults, "")
    assert log.note("log.jsonl") == ("1 line of log.jsonl cannot be read" if faults else "")
    # The line after it is read, too.
    path.write_bytes(damage.rstrip(b"\0\n") + b"\n" + GOOD)
    assert read_json_lines(path).objects[-1] == {"a": 1}


def test_a_line_without_end_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "LARGEST_TEXT", 100)
    path = tmp_path / "log.jsonl"
    path.write_bytes(GOOD + b"x" * 1000 + b"\n" + b"y" * 200 + b"\n" + GOOD + b"z" * 300)
    log = read_json_lines(path)
    assert (len(log.objects), log.faults) == (2, 3)


def test_a_log_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n', encoding="utf-8-sig")
    assert read_json_lines(path).objects == ({"a": 1},)


def test_what_is_no_file_is_reported_and_not_waited_for(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "none").note("none") == ""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name, words in (
        ("pipe", "it is a pipe or a device"),
        ("folder", "it is a folder"),
        ("link", "is a link to nothing"),
    ):
        log = read_json_lines(tmp_path / name)
        assert log.objects == ()
        assert words in log.note(name)
    assert "a pipe or a device" in read_json_lines(Path("/dev/zero")).failure


def test_numbers_of_a_log() -> None:
    assert [whole_number(value) for value in (5, "5", 5.0, 0)] == [5, 5, 5, 0]
    for value in (-1, 5.5, True, None, "x", [], {}, math.nan, math.inf, 1 << 60, 10**400):
        assert whole_number(value) is None, value
    assert real_number("2.5") == 2.5
    assert math.isnan(real_number(None) or 0.0)
    for odd in (True, "x", [], {}, 10**400):
        assert real_number(odd) is None, odd
    assert json.dumps(real_number(3)) == "3"
