"""Every option of bench, doctor and schedule with odd values: a message, never a bare exception.

The commands run in this process. A value that is fine does its work, so all of it is small.
"""

import importlib
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpillm import cli
from mpillm.system.command_line import CommandParameter, Option, command_parameters
from mpillm.verbs.command import make_command
from mpillm.verbs.verb_catalog import VERBS

ODD = (
    *("", " ", "0", "-1", "1", "2", "nan", "inf", "-inf", "1e308", "1e-320", "1e400", "٣", "0x10"),
    *("9223372036854775807", "9223372036854775808", "1" + "0" * 30, "9" * 5000, "1_000", "½", "+7"),
    *(
        "a\0b",
        "x" * 5000,
        "é" * 300,
        "\ud800",
        "caf\udce9",
        "\x1b[31m",
        "'\"`$(id)",
        "--",
        "-",
        "a,b,,c",
        ",,,",
    ),
    *("none.csv", "/dev/null", "/dev/zero", "/", ".", "~", "../..", "/proc/self/mem", "\n", "日本"),
    *(
        "os:getcwd",
        "json:None",
        "a.b:C",
        "sys:exit",
        "antigravity_none:X",
        ":",
        "a:",
        "numpy:float64",
    ),
    *(
        "900G",
        "1:1:x1",
        "1:900G:x1.0000001",
        "64,",
        "1K:1K",
        "0.5",
        "1:2:3:4",
        "-4:4",
        "1e9",
        "KKK",
    ),
    *("1,1,1,0", "1e9,0,0,0", "1e-9,1e9,0,1e9", "nan,1,1,1", "1e308,1e308,1,1", "1,1,1", "0,0,0,1"),
    *("float32", "cuda", "cpu", "ring", "sum", "gpipe", "all", "1f1b", "zb-v", "x.png", "x.svg"),
)
STARTS = {
    "bench": (["barrier", "--iterations", "1", "--warmup", "0"], ["gemm", "--iterations", "1"]),
    "doctor": ([],),
    "schedule": (["gpipe", "--ranks", "3", "--microbatches", "5"], ["all"], ["zb-v"]),
}
SECONDS = 30


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; signals and environment as before at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def run(name: str, words: list[str]) -> int:
    """Run a command as cli.main does; return its exit code."""
    module, _, attribute = VERBS[name].partition(":")
    made = make_command(name, getattr(importlib.import_module(module), attribute))
    try:
        made.main(args=words, standalone_mode=False)
        return 0
    except SystemExit as left:
        return int(left.code or 0)
    except Exception as failure:
        try:
            cli._print_failure(failure)
        except SystemExit as left:
            return int(left.code or 0)
        return int(getattr(failure, "exit_code", 1))


def words_of(chance: random.Random, one: CommandParameter) -> list[str]:
    value = chance.choice(ODD)
    if not isinstance(one.marker, Option):
        return [value]
    if one.kind in (bool, bool | None):
        return [chance.choice(one.flag.split("/"))]
    return [f"{one.flag}={value}"] if chance.random() < 0.5 else [one.flag, value]


def parameters_of(name: str) -> list[CommandParameter]:
    module, _, attribute = VERBS[name].partition(":")
    return list(command_parameters(getattr(importlib.import_module(module), attribute)))


def draw(name: str, seed: int) -> list[str]:
    """Draw a command: a start that works, and one to three options with odd values."""
    chance = random.Random(f"{name} {seed}")
    words = list(chance.choice(STARTS[name]))
    for one in chance.sample(parameters_of(name), chance.randint(1, 3)):
        # The debug option prints tracebacks on purpose.
        if one.name != "debug":
            words += words_of(chance, one) * chance.choice((1, 1, 1, 2))
    if name == "bench" and "--sizes" not in " ".join(words):
        words += ["--sizes", "16"]
    return words


def try_out(name: str, words: list[str], capsys: Any) -> None:
    started = time.monotonic()
    code = run(name, words)
    printed = capsys.readouterr()
    assert code in (0, 1, 2), (name, words, code)
    assert "a fault of mpillm itself" not in printed.err, (name, words, printed.err)
    assert "Traceback" not in printed.err + printed.out, (name, words)
    assert "\x1b[31m" not in printed.err, (name, words)
    assert len(printed.err) < 2500, (name, words, printed.err[:3000])
    if code == 1 or code == 2:
        assert printed.err or printed.out or name == "doctor", (name, words)
    assert time.monotonic() - started < SECONDS, (name, words)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.usefixtures("here")
def test_schedule(seed: int, capsys: Any) -> None:
    for turn in range(25):
        try_out("schedule", draw("schedule", 100 * seed + turn), capsys)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.usefixtures("here")
def test_bench(seed: int, capsys: Any) -> None:
    for turn in range(12):
        try_out("bench", draw("bench", 100 * seed + turn), capsys)
