"""What comes out of files reaches a terminal and a shell without effect on either."""

import errno
import os
import shlex
import subprocess

import pytest

from mpillm.system.messages import REMEDIES, command, explain, one_line, printable, why


def test_controls_become_escapes_and_text_stays() -> None:
    assert printable("\x1b[2J\x07a\rb\x9bc\u202ed\ud800") == (r"\x1b[2J\x07a\rb\x9bc\u202ed\ud800")
    text = "Größe\t1\n日本語 🙂"
    assert printable(text) == text


@pytest.mark.parametrize("word", ["a b", 'é "x" $(id)', "it's", "", "-n", "a\nb", "`id`", "*"])
def test_a_command_can_be_pasted(word: str) -> None:
    assert shlex.split(command(["mpillm", "status", word])) == ["mpillm", "status", word]


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("word", [b"caf\xe9", b"\x1b[31m'\\", "a\u202eb\n".encode()])
def test_a_command_with_bytes_no_terminal_shows_can_be_pasted(word: bytes) -> None:
    line = command(["printf", "%s", os.fsdecode(word)])
    assert printable(line) == line
    assert subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout == word


def test_a_name_stays_on_its_line() -> None:
    assert one_line("a\nb\tc\udce9[bold]") == r"a\nb\tc\udce9[bold]"
    assert explain(OSError(errno.EPIPE, "why", "a\nb")) == r"a\nb: why"


@pytest.mark.parametrize("code", sorted(REMEDIES), ids=errno.errorcode.get)
def test_a_failure_has_its_file_reason_and_remedy(code: int) -> None:
    failure = OSError(code, "why", "/a/file")
    assert explain(failure) == f"/a/file: why; {REMEDIES[code]}"
    assert explain(OSError(code, "why"), "b") == f"b: why; {REMEDIES[code]}"


def test_a_failure_without_parts_still_says_what_it_is() -> None:
    assert explain(OSError()) == "OSError"
    assert explain(OSError("short")) == "short"
    assert explain(TimeoutError(errno.EPIPE, "Broken pipe", b"/x\xff")) == "/x\udcff: Broken pipe"


def test_a_reason_is_given_alone() -> None:
    assert why(OSError(errno.ELOOP, "Too many levels", "/a")) == "Too many levels"
    assert why(ValueError("odd")) == "odd"
    assert why(KeyError()) == "KeyError"
