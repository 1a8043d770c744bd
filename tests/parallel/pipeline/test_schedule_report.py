"""`mpillm schedule` as a user types it."""

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from mpillm.errors import LayoutError, UsageError
from mpillm.parallel.pipeline.schedule_catalog import SCHEDULES, make_schedule
from mpillm.parallel.pipeline.schedule_report import ScheduleOptions, ShareCosts, print_schedule
from mpillm.system.console import Console

PAGE = Path(__file__).parents[3] / "docs/schedules.md"
SIZE = ("--ranks", "4", "--microbatches", "8")


def test_the_chart_and_its_figures(mpillm):
    done = mpillm("schedule", "1f1b", *SIZE)
    assert done.returncode == 0, done.stderr
    assert "rank 3 ·········F0 B0    F1 B1" in done.stdout
    told = dict(re.findall(r"^  (\w[\w ]*?)  +(.*?) *$", done.stdout, re.MULTILINE))
    assert told["makespan"] == "33"
    assert told["ideal"].startswith("24 ")
    assert told["bubble"].startswith("37.5% ")
    assert told["stored at most"].startswith("4, 3, 2, 1 ")
    assert told["messages"] == "48 a step"
    assert "\x1b" not in done.stdout


def test_files_and_json(mpillm, folder):
    """A schedule that was written is read again, and is the same."""
    files = [
        argument
        for kind in ("svg", "png", "csv")
        for argument in (f"--{kind}", folder / f"own.{kind}")
    ]
    done = mpillm("schedule", "zb-v", *SIZE, *files, "--json")
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert sorted(path.name for path in folder.iterdir()) == ["own.csv", "own.png", "own.svg"]
    again = json.loads(mpillm("schedule", folder / "own.csv", "--json").stdout)
    assert again == first | {"schedule": "own.csv"}
    assert first["makespan"] == (6 * 8 + 3) / 2
    assert first["peaks"] == [4, 4, 4, 4]
    assert (first["ranks"], first["chunks"], first["microbatches"], first["messages"]) == (
        4,
        2,
        8,
        96,
    )
    assert first["costs"] == {
        "forward": 1,
        "backward_input": 1,
        "backward_weight": 1,
        "transfer": 0,
    }


def test_costs(mpillm):
    found = json.loads(
        mpillm(
            "schedule", "interleaved", *SIZE, "--chunks", "4", "--costs", "4,4,0,0", "--json"
        ).stdout
    )
    assert found["makespan"] == 8 * 8 + 3 * 2  # (p−1)(F+B)/v over the ideal
    slower = json.loads(
        mpillm("schedule", "interleaved", *SIZE, "--costs", "4,4,0,1", "--json").stdout
    )
    assert slower["makespan"] > found["makespan"]


def test_all_beside_one_another(mpillm):
    done = mpillm("schedule", "all", *SIZE)
    assert done.returncode == 0, done.stderr
    for name in SCHEDULES:
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)
    few = mpillm("schedule", "all", "--ranks", "4", "--microbatches", "6")
    assert "left out: zb-v on 4 ranks needs at least 8 microbatches, not 6" in few.stdout
    found = json.loads(
        mpillm("schedule", "all", "--ranks", "4", "--microbatches", "6", "--json").stdout
    )
    assert [row["schedule"] for row in found["schedules"]] == [
        "gpipe",
        "1f1b",
        "interleaved",
        "zb-h1",
    ]
    assert set(found["left_out"]) == {"zb-v", "dualpipe-v"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("1f1b",), "1f1b needs --ranks P and --microbatches M"),
        (("all", "--ranks", "2"), "all needs --ranks P and --microbatches M"),
        (("1b1f", *SIZE), "did you mean 1f1b"),
        (("nowhere.schedules:MINE",), "needs --ranks P and --microbatches M"),
        (("nowhere.schedules:MINE", *SIZE), "cannot be imported"),
        (("zb-v", "--ranks", "4", "--microbatches", "2"), "at least 8 microbatches, not 2"),
        (("1f1b", *SIZE, "--costs", "1,2"), "--costs takes F,B,W,T"),
        (("1f1b", *SIZE, "--svg", "{}/a.png"), "--svg takes the name of a .svg file"),
        (("1f1b", *SIZE, "--png", "{}/none/a.png"), "cannot write"),
        (("1f1b", *SIZE, "--csv", "{}/none/a.csv"), "cannot write"),
        (("all", *SIZE, "--csv", "{}/a.csv"), "name one instead of all"),
        (("{}/none.csv",), "cannot read the schedule"),
    ],
)
def test_a_mistake_is_one_line(mpillm, folder, arguments, words):
    done = mpillm("schedule", *(argument.format(folder) for argument in arguments))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("mpillm: error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_help_shows_an_example(mpillm):
    assert "mpillm schedule 1f1b " in mpillm("schedule", "--help").stdout.partition("Example:")[2]


@pytest.mark.parametrize("name", ["all", "dualpipe-v"])
def test_neither_mpi_nor_torch_is_loaded(python, folder, name):
    picture = [] if name == "all" else ["--svg", str(folder / "a.svg")]
    code = (
        f"import sys\nsys.argv = ['mpillm', 'schedule', '{name}', *{[*SIZE, *picture]}]\n"
        "from mpillm.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print('loaded:', [name for name in ('torch', 'mpi4py', 'h5py') if name in sys.modules])\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "bubble" in done.stdout
    assert "loaded: []" in done.stdout


def test_the_page_shows_what_is_printed(mpillm, folder):
    """Each line below a command in docs/schedules.md is a line of its output."""
    shown = re.findall(
        r"^\$ (cat|mpillm schedule) (.*)\n((?:(?!\$|```).*\n)*)",
        PAGE.read_text("utf-8"),
        re.MULTILINE,
    )
    assert len(shown) >= 9
    for command, arguments, text in shown:
        if command == "cat":
            (folder / arguments).write_text(text)
            continue
        words = [
            str(folder / word) if word.endswith(".csv") else word for word in arguments.split()
        ]
        done = mpillm("schedule", *words, COLUMNS="100")
        printed = {line.rstrip() for line in (done.stdout + done.stderr).splitlines()}
        assert [line for line in text.splitlines() if line not in printed] == []


def test_the_page_s_plug_in_runs(mpillm, folder):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (folder / "my_schedules.py").write_text(block)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = mpillm("schedule", "my_schedules:ONE_BY_ONE", *SIZE, "--json", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peaks"] == [1, 1, 1, 1]


def test_one_rank_speaks(mpillm, folder):
    done = mpillm("schedule", "1f1b", *SIZE, "--csv", folder / "own.csv", ranks=3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    assert [path.name for path in folder.iterdir()] == ["own.csv"]
    wrong = mpillm("schedule", "1b1f", *SIZE, ranks=3)
    assert wrong.returncode != 0
    assert wrong.stderr.count("did you mean 1f1b") == 1


def test_a_terminal_gets_colours(capsys):
    print_schedule(
        ScheduleOptions("zb-v", 2, 4, coloured=True), Console(stream=sys.stdout, watched=True)
    )
    assert "\x1b[" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["", "1,1,1", "1,1,1,1,1", "1,x,1,0", "1,-1,1,0", "1,inf,1,0", "1,nan,1,0", "0,0,0,1"]
)
def test_costs_that_are_none(text):
    with pytest.raises(UsageError, match="four numbers from 0 up"):
        ShareCosts.parse(text)


def test_a_rank_s_share_is_shared_by_its_stages():
    costs = ShareCosts.parse("2,4,6,1").of_stages(make_schedule("interleaved", 2, 2, 4))
    assert costs.forward == (0.5,) * 8
    assert costs.backward_input == (1,) * 8
    assert costs.backward_weight == (1.5,) * 8
    assert costs.transfer == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ranks": 10**6, "microbatches": 10**6}, "3,000,000,000,000 actions, at most 1,000,000"),
        ({"ranks": 2, "microbatches": 10**6}, "6,000,000 actions"),
        ({"ranks": 600, "microbatches": 2, "png": Path("x.png")}, "draws at most 512 ranks"),
        ({"ranks": 2, "microbatches": 2, "csv": Path("x.svg"), "svg": Path("x.svg")}, "both name"),
    ],
)
def test_what_is_too_large_is_refused_with_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, LayoutError), match=words):
        print_schedule(ScheduleOptions("gpipe", **settings), Console(stream=io.StringIO()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("costs", ["1e9,1e-9,0,1e9", "1e-9,1e-9,1e-9,0", "1e9,1e9,1e9,1e9"])
def test_the_smallest_and_the_largest_costs_are_drawn(costs: str) -> None:
    out = io.StringIO()
    print_schedule(ScheduleOptions("1f1b", 3, 7, costs=costs), Console(stream=out))
    assert "makespan" in out.getvalue()


@pytest.mark.parametrize("which", ["svg", "png", "csv"])
def test_a_device_and_a_link_are_written_in_place(tmp_path: Path, which: str) -> None:
    (tmp_path / f"link.{which}").symlink_to(tmp_path / f"target.{which}")
    for path in (Path("/dev/null"), tmp_path / f"link.{which}"):
        print_schedule(
            ScheduleOptions("gpipe", 2, 2, **{which: path}), Console(stream=io.StringIO())
        )
    assert Path("/dev/null").is_char_device()
    assert (tmp_path / f"link.{which}").is_symlink()
    assert (tmp_path / f"target.{which}").stat().st_size
