"""The trials of benchmarks/reliability.py see what they are there for."""

import random
import sys
from pathlib import Path

import pytest

from mpillm.verbs.verb_catalog import VERBS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from trials import child, kinds, workspace


@pytest.mark.parametrize(
    ("code", "err", "fault"),
    [
        (0, "", None),
        (1, "mpillm: error: /data/manifest.json is damaged; copy it again\n", None),
        (2, "Usage: mpillm …\n╭─ Error ─╮\n│ No such option: --x │\n", None),
        (1, "", "without a word"),
        (4, "mpillm: error: a\n", "exit code 4"),
        (-11, "", "died of signal 11"),
        (1, "Traceback (most recent call last):\n", "bare"),
        (1, "mpillm: error: a fault of mpillm itself: KeyError: 'a'\n", "bare"),
        (1, "mpillm: error: cannot read: RuntimeError: unable to open\n", "bare"),
        (1, "mpillm: error: [Errno 28] No space left on device\n", "bare"),
        (0, "Exception ignored in: <_io.TextIOWrapper>\n", "bare"),
    ],
)
def test_an_end_is_judged(code: int, err: str, fault: str | None) -> None:
    found = child._faults(child.Outcome(("status", "run"), code, "", err))
    assert [fault in text for text in found] == ([] if fault is None else [True]), found


def test_a_word_that_was_typed_is_no_fault() -> None:
    done = child.Outcome(("status", "KeyError"), 2, "", "mpillm: error: no folder KeyError\n")
    assert child._faults(done) == []


@pytest.mark.parametrize("way", [*kinds.DAMAGES, "word"])
def test_damage_changes_the_file_and_can_be_repeated(tmp_path: Path, way: str) -> None:
    path, seen = tmp_path / "a.json", []
    for _ in range(2):
        path.write_text('{"a": [1, {"b": "c"}], "d": "e"}')
        chance = random.Random(3)
        if way == "word":
            kinds._damage_json(path, chance)
        else:
            path.write_bytes(kinds.DAMAGES[way](path.read_bytes(), 5, chance))
        seen.append(path.read_bytes())
    assert seen[0] == seen[1] != b'{"a": [1, {"b": "c"}], "d": "e"}'


def test_temporary_files_are_found(tmp_path: Path) -> None:
    for name in (".a.0123456789abcdef.tmp", ".stdlib.partial", ".hidden", "a.tmp", "lock"):
        (tmp_path / name).touch()
    assert child.temporary_files(tmp_path) == [".a.0123456789abcdef.tmp", ".stdlib.partial"]


def test_every_verb_takes_part() -> None:
    assert set(workspace.LINES) <= set(VERBS)
    for verb in VERBS:
        assert all(line.split()[0] == verb for line in workspace.lines_of(verb))


def test_each_file_is_read_by_the_verbs_that_need_it() -> None:
    def readers(name: str) -> set[str]:
        return {v for v in VERBS if any(kinds._reads(line, name) for line in workspace.lines_of(v))}

    assert readers("prepared/stdlib/train-00000.h5") >= {"prepare", "train", "evaluate", "generate"}
    assert readers("runs/quickstart/history.jsonl") >= {"train", "status", "report", "evaluate"}
    assert readers("prepared/pairs/train-00000.h5") == {"prepare", "train"}
    assert readers("pairs.jsonl") == {"prepare"}
    assert readers("rows.csv") == {"schedule"}
    assert readers("site.toml") == {"submit"}
