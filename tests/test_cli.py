"""The whole way as a user goes it: each verb through the command line, alone and under mpirun."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("processes")

RECIPE = """
[model]
layers = 1
width = 32
heads = 2
context = 32
[data]
path = "{folder}/data"
[train]
run = "{folder}/run"
steps = 6
batch = 4
"""


@pytest.fixture
def text(folder: Path) -> Path:
    path = folder / "text"
    path.mkdir()
    for number in range(30):
        (path / f"{number}.txt").write_text(
            f"document {number}\n" + "the quick brown fox jumps over the dog\n" * 20
        )
    return path


def test_the_whole_way_on_two_ranks(mpillm, folder: Path, text: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = folder / "small.toml"
    recipe.write_text(RECIPE.format(folder=folder))
    prepared = mpillm(
        "prepare",
        text,
        "--out",
        folder / "data",
        "--vocab-size",
        "300",
        "--validation",
        "0.2",
        ranks=2,
    )
    assert prepared.returncode == 0, prepared.stderr
    assert "bytes/token" in prepared.stdout
    verified = mpillm("prepare", "--verify", folder / "data")
    assert verified.returncode == 0, verified.stderr
    trained = mpillm("train", recipe, "--set", "train.steps=8", ranks=2)
    assert trained.returncode == 0, trained.stderr
    assert "parameters" in trained.stdout
    assert "finished" in trained.stdout
    scores = []
    for ranks in (1, 2):
        evaluated = mpillm("evaluate", folder / "run", "--json", "--baselines", ranks=ranks)
        assert evaluated.returncode == 0, evaluated.stderr
        scores.append(json.loads(evaluated.stdout))
    assert scores[0] == scores[1]
    assert set(scores[0]) == {
        "checkpoint",
        "step",
        "data",
        "data_of_the_run",
        "model",
        "bigram",
        "unigram",
    }
    assert scores[0]["step"] == 8
    spoken = [
        mpillm("generate", folder / "run", "--prompt", "the ", "--max-tokens", "9", ranks=n)
        for n in (1, 2)
    ]
    assert spoken[0].returncode == 0, spoken[0].stderr
    # A launcher's pseudo-terminal ends lines its own way.
    assert spoken[0].stdout.split() == spoken[1].stdout.split()
    assert spoken[0].stdout.startswith("the ")


def test_versions(mpillm) -> None:  # type: ignore[no-untyped-def]
    assert mpillm("--version").stdout.startswith("mpillm ")
    told = mpillm("--version", "--verbose").stdout
    assert all(word in told for word in ("mpi4py", "torch", "h5py", "MPI", "HDF5"))


@pytest.mark.parametrize("verb", ["prepare", "train", "evaluate", "generate", "bench"])
def test_help_shows_an_example(mpillm, verb: str) -> None:  # type: ignore[no-untyped-def]
    done = mpillm(verb, "--help")
    assert done.returncode == 0
    assert f"mpillm {verb} " in done.stdout.partition("Example:")[2]


def test_one_rank_speaks(mpillm) -> None:  # type: ignore[no-untyped-def]
    assert mpillm("--help", ranks=3).stdout.count("Usage:") == 1
    wrong = mpillm("train", "--sett", "x", ranks=3)
    assert wrong.returncode != 0
    assert (wrong.stdout + wrong.stderr).count("No such option") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prepare", "nowhere.txt", "--out", "{}/d"), "nowhere.txt"),
        (("prepare", "stdlib", "--out", "{}/d", "--vocab-size", "100"), "takes 257 to"),
        (("prepare", "stdlib"), "--out"),
        (("prepare", "stdlib", "--out", "/proc/nowhere"), "/proc"),
        (("prepare", "--verify", "{}/nothing"), "is not a prepared dataset"),
        (("train", "{}/none.toml"), "cannot read the recipe"),
        (("evaluate", "{}/none"), "does not exist"),
        (("generate", "{}/none", "--prompt", "x"), "does not exist"),
        (("generate", "{}/none", "--prompt", "x", "--top-p", "7"), "--top-p is a number above 0"),
    ],
)
def test_a_mistake_ends_in_one_message(
    mpillm, folder: Path, arguments: tuple[str, ...], words: str
) -> None:  # type: ignore[no-untyped-def]
    done = mpillm(*(argument.format(folder) for argument in arguments))
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) <= 4
    assert list(folder.iterdir()) == []


def test_a_mistake_of_all_ranks_is_told_once(mpillm, folder: Path) -> None:  # type: ignore[no-untyped-def]
    done = mpillm("train", folder / "none.toml", ranks=3)
    assert done.returncode != 0
    assert done.stderr.count("cannot read the recipe") == 1


def test_debug_shows_where(mpillm, folder: Path) -> None:  # type: ignore[no-untyped-def]
    assert "Traceback" in mpillm("train", folder / "none.toml", "--debug").stderr
