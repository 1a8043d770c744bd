"""What people read: on the rank that speaks, at a terminal and in a batch log."""

import io
from collections.abc import Callable

import pytest

from mpillm.system import console
from mpillm.system.console import Console, binary_bytes, clock

HOSTILE = [
    "[red]no markup[/red]",
    "[/]",
    "a:on:b :smile:",
    "x[0]",
    "back\\",
    "\\[x]",
    "[link=x]",
    "é → ×",
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def spoken(speak: Callable[[Console], None], speaks: bool = True) -> str:
    stream = io.StringIO()
    speak(Console(speaks, stream))
    return stream.getvalue()


def everything(voice: Console) -> None:
    voice.say("text")
    voice.warn("text")
    voice.write("text")
    voice.table("title", ["a", "b"], [["1", "2"]])
    voice.facts("title", {"a": "1"})
    with voice.progress("work", 10, "steps") as progress:
        progress.advance(10)


def test_a_rank_that_does_not_speak_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LOG_INTERVAL_SECONDS", 0)
    assert spoken(everything, speaks=False) == ""
    assert spoken(everything).count("text") == 3


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_as_it_is(text: str) -> None:
    assert spoken(lambda voice: voice.say(text)) == text + "\n"
    assert spoken(lambda voice: voice.warn(text)) == f"warning: {text}\n"
    assert spoken(lambda voice: voice.write(text)) == text
    assert text in spoken(lambda voice: voice.table("title", [text, "b"], [["1", "2"]]))
    assert text in spoken(lambda voice: voice.table("title", ["a", "b"], [[text, "2"]]))
    assert text in spoken(
        lambda voice: voice.table(text, ["a", "b"], [["a long enough cell", "another long cell"]])
    )
    assert spoken(lambda voice: voice.facts("title", {text: text})).count(text) == 2


def test_a_long_line_is_not_broken_in_a_log() -> None:
    assert spoken(lambda voice: voice.say("word " * 100)).count("\n") == 1


def test_figures_stand_to_the_right() -> None:
    lines = spoken(
        lambda voice: voice.table("sizes", ["name", "bytes"], [["a", "7"], ["b", "1,000"]])
    ).splitlines()
    assert lines[0].startswith("sizes")
    seven, thousand = (next(line for line in lines if figure in line) for figure in ("7", "1,000"))
    assert seven.rstrip().index("7") == thousand.index("1,000") + len("1,000") - 1


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def work(voice: Console) -> None:
        with voice.progress("training", 1000, "steps") as progress:
            for step in range(100):
                now[0] += 1
                progress.advance(10, loss=f"{5 - step / 100:.2f}")

    lines = spoken(work).splitlines()
    # The last is said once, though the end and the interval meet.
    assert len(lines) == 100 / console.LOG_INTERVAL_SECONDS
    assert lines[0] == "training 50/1,000 steps  loss 4.96  1:35 left"
    assert lines[-1] == "training 1,000/1,000 steps  loss 4.01"
    assert not any(character in "".join(lines) for character in "\r\x1b")


def test_work_done_before_does_not_count_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def work(voice: Console) -> None:
        with voice.progress("training", 1000, "steps", start=900) as progress:
            now[0] += 10
            progress.advance(10)

    assert spoken(work).splitlines()[0].endswith("1:30 left")


def test_an_interrupted_work_tells_how_far_it_came() -> None:
    stream = io.StringIO()

    def work() -> None:
        with Console(stream=stream).progress("training", 1000, "steps") as progress:
            progress.advance(10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert "training 10/1,000 steps" in stream.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Console(stream=stream).progress("training", 1000, "steps", start=500) as progress:
        progress.advance(500, loss="2.5")
    assert "━" in stream.getvalue()
    assert "1,000/1,000 steps" in stream.getvalue()
    assert "loss 2.5" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (7500, "2:05:00"), (360_000, "100:00:00")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        (-3 << 30, "-3.0 GiB"),
        (5 << 40, "5.0 TiB"),
        (1 << 51, "2,048.0 TiB"),
    ],
)
def test_binary_bytes(count: float, text: str) -> None:
    assert binary_bytes(count) == text


def test_what_is_done_instead_is_said_once() -> None:
    heard: list[str] = []
    warn = console.once_each(heard.append)
    for text in ("5 bytes lack; messages are sent", "6 bytes lack; messages are sent", "other"):
        warn(text)
    assert heard == ["5 bytes lack; messages are sent", "other"]
