"""Whatever is at the other end of stdout and stderr, work goes on and its exit code is true."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.usefixtures("processes")

SCHEDULE = "schedule gpipe --ranks 2 --microbatches 3"


@pytest.fixture
def shell(python: Run, tmp_path: Path) -> Callable[[str], tuple[int, str]]:
    """Run a line of bash in which `M` is mpillm; give its exit code and what stderr got."""

    def run(line: str) -> tuple[int, str]:
        code = (
            "import subprocess, sys;"
            "done = subprocess.run(['bash', '-c', 'M() { \"$1\" -m mpillm \"${@:2}\"; };' + "
            "sys.argv[1].replace('M ', 'M ' + sys.executable + ' ')], text=True,"
            " stderr=subprocess.PIPE, stdin=subprocess.DEVNULL);"
            "sys.stderr.write(done.stderr); sys.exit(done.returncode)"
        )
        done = python("-c", code, line)
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize(
    "words",
    ["--version", "--help", "train --help", "doctor --json .", SCHEDULE, f"{SCHEDULE} --json"],
)
def test_a_full_disk_is_one_message(shell: Callable[..., tuple[int, str]], words: str) -> None:
    code, text = shell(f"M {words} > /dev/full")
    assert code == 2
    assert text.startswith("mpillm: error: cannot write the output: No space left on device; free")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("end", ["| true; exit ${PIPESTATUS[0]}", ">&-", ">&- 2>&-", "<&-"])
def test_a_reader_that_leaves_is_no_failure(
    shell: Callable[..., tuple[int, str]], end: str
) -> None:
    assert shell(f"M {SCHEDULE} {end}") == (0, "")


def test_a_full_disk_under_stderr_keeps_the_exit_code(
    shell: Callable[..., tuple[int, str]],
) -> None:
    assert shell("M status /absent 2> /dev/full")[0] != 0
    assert shell("M schedule nothing --ranks 1 --microbatches 1 2>&-")[0] == 2


def test_letters_that_a_terminal_lacks_are_escaped(shell: Callable[..., tuple[int, str]]) -> None:
    code, text = shell(f"PYTHONIOENCODING=ascii M {SCHEDULE} >&2")
    assert code == 0
    assert r"\xb7" in text
