"""Each exit code of docs/reliability.md is produced by a command."""

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Begin = Callable[..., "subprocess.Popen[str]"]

PAGE = Path(__file__).parents[1] / "docs/reliability.md"
RECIPE = """
[model]
layers = 1
width = 16
heads = 2
context = 16
[data]
path = "data"
[train]
run = "run"
steps = 3
batch = 2
"""


@pytest.fixture(scope="module")
def place(mpillm: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset `data` and a recipe that trains on it."""
    folder = tmp_path_factory.mktemp("codes")
    (folder / "texts").mkdir()
    for number in range(40):
        (folder / f"texts/{number}.txt").write_text(f"document {number}\n" * 20)
    (folder / "recipe.toml").write_text(RECIPE)
    words = "prepare texts --out data --tokenizer bytes --validation 0.1"
    done = mpillm(*words.split(), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_table_has_the_codes_that_are_tried() -> None:
    text = PAGE.read_text(encoding="utf-8")
    codes = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert codes == ["0", "1", "2", "3", "75", "130"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "train recipe.toml --set train.run=done"),
        (1, "prepare --verify texts"),
        (2, "train recipe.toml --set train.steps=0"),
        (
            3,
            "train recipe.toml --set train.run=diverged --set optimizer.learning_rate=1e38 "
            "--set optimizer.warmup_steps=0",
        ),
        (
            75,
            "train recipe.toml --set train.run=stopped --set train.steps=100000 "
            "--set train.time_limit='0:00:05'",
        ),
    ],
)
def test_a_command_leaves_with(mpillm: Run, place: Path, code: int, words: str) -> None:
    done = mpillm(*words.replace("'", '"').split(), cwd=place)
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("mpillm: ")]
    assert len(errors) == (code != 0), done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_with_130(begin: Begin, number: signal.Signals) -> None:
    words = ("bench", "allreduce", "--sizes", "64M", "--iterations", "100000")
    process = begin(*words)
    time.sleep(4)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert text.startswith("mpillm: interrupted"), text
    assert len(text.splitlines()) == 1
