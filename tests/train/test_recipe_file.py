"""Recipes as editors, shells and copies of folders leave them."""

import os
from pathlib import Path

import pytest

from mpillm.errors import RecipeError
from mpillm.runs.history import HistoryWriter
from mpillm.train.recipe import Recipe, load_recipe, write_recipe
from mpillm.train.recipe_file import LARGEST_BYTES

GOOD = '[data]\npath = "prepared/x"\n[train]\nsteps = 10\n'


def write(folder: Path, contents: str | bytes, name: str = "r.toml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return path


@pytest.mark.parametrize(
    "contents",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace("\n", "\r\n").encode(),
        GOOD.encode("utf-16"),
        b"\xfe\xff" + GOOD.encode("utf-16-be"),
        GOOD.encode("utf-32"),
    ],
)
def test_a_mark_and_windows_line_ends_are_taken_off(tmp_path: Path, contents: bytes) -> None:
    assert load_recipe(write(tmp_path, contents)).train.steps == 10


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (GOOD.encode("utf-16-le"), "holds zero bytes, as UTF-16 does"),
        (GOOD.encode() + b"# caf\xe9\n", r"byte \d+ is not UTF-8; save it as UTF-8"),
        (b"#" * (LARGEST_BYTES + 1), "is larger than 1,048,576 bytes; name a TOML file"),
        (b"x = " + b"[" * 100_000, "is nested too deeply"),
        (b"[" + b"a." * 50_000 + b"a]\n", "is nested too deeply"),
        (b"x = " + b"9" * 5000, "a number of more than 4,000 digits"),
        (b"[data]\n[data]\n", "is not valid TOML: Cannot declare"),
    ],
)
def test_what_is_no_recipe_is_refused_with_the_cure(
    tmp_path: Path, contents: bytes, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(write(tmp_path, contents))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (".", "is a folder and should be a plain file; name a TOML file"),
        ("/dev/null", "is a pipe or a device"),
        ("nowhere.toml", "No such file or directory; check the name"),
        ("x" * 300, "File name too long; choose a shorter name"),
        ("a\0b", "null byte; name a TOML file"),
    ],
)
def test_places_that_are_no_files(tmp_path: Path, path: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(tmp_path / path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.learning_rate=inf", r"optimizer\.learning_rate = inf: a setting is a finite"),
        ("optimizer.weight_decay=-inf", r"optimizer\.weight_decay = -inf"),
        ("optimizer.clip=nan", r"optimizer\.clip = nan: a setting is a finite number"),
        ("model.rope_theta=1e999", r"model\.rope_theta = inf"),
        ("train.seed=9223372036854775808", r"train\.seed has 64 bits: a setting is less than 2"),
        ("train.steps=-99999999999999999999", r"train\.steps has 67 bits"),
        ("train.steps=" + "9" * 5000, r"train\.steps = '9+\.\.\.9+': input should be a valid int"),
        ("train.run=2024", r"train\.run = 2024: .* write run = \"2024\" .* --set 'train\.run=\"2"),
        ("train.run=true", r'train\.run = true: .* run = "true"'),
        ("data.path=7.5", r'path = "7\.5"'),
        ("train.time_limit=90", r"a time is H:MM:SS, .*such as 1:30:00, .* and not '90'"),
        ("data.path=caf\udce9", r"data\.path = .*: a text is UTF-8 without NUL"),
        ("data.path=a\0b", r"a text is UTF-8 without NUL"),
        ("train.run=~no-such-user/x", r"home directory.*write the whole path"),
    ],
)
def test_values_that_no_setting_can_have(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(write(tmp_path, GOOD), [override])


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(write(tmp_path, GOOD), ["data.path=~/x", "train.run=~/runs/y"])
    assert recipe.data.path == str(tmp_path / "x")
    assert recipe.train.run == str(tmp_path / "runs/y")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Make the folder runs/first of a run that trained from tmp_path; return its recipe."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write(tmp_path, GOOD), ["train.run=runs/first"])
    write(tmp_path / "runs/first", write_recipe(recipe), "recipe.toml")
    leave(tmp_path / "runs/first", "checkpoints")
    return recipe


def leave(folder: Path, mark: str) -> None:
    """Make what training leaves in a run's folder."""
    if mark == "checkpoints":
        (folder / mark / "step-00000002").mkdir(parents=True)
    else:
        HistoryWriter(folder, writes=True).started(0, {})
        if mark != "history.jsonl":
            (folder / "history.jsonl").rename(folder / mark)


def test_a_run_at_its_own_place_is_spelled_as_before(run: Recipe, tmp_path: Path) -> None:
    said: list[str] = []
    assert load_recipe(Path("runs/first/recipe.toml"), (), said.append) == run
    assert load_recipe(tmp_path / "runs/first/recipe.toml", (), said.append) == run
    assert said == []


@pytest.mark.parametrize("mark", ["checkpoints", "history.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("name", ["recipe.toml", "job.toml"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_recipe_in_a_run_means_that_run(
    run: Recipe, tmp_path: Path, mark: str, name: str, moved: bool
) -> None:
    if moved:
        (tmp_path / "runs/first").rename(tmp_path / "elsewhere")
    path = write(tmp_path / "runs/second", write_recipe(run), name)
    leave(path.parent, mark)
    said: list[str] = []
    assert load_recipe(Path("runs/second") / name, (), said.append).train.run == "runs/second"
    assert said == ["the run is runs/second, where its recipe is: the recipe names runs/first"]
    os.chdir(path.parent)
    # Metrics alone may be those of a project.
    assert load_recipe(Path(name)).train.run == ("runs/first" if mark == "metrics.jsonl" else ".")
    asked = load_recipe(Path(name), ["train.run=third"], said.append)
    assert asked.train.run == "third"
    assert len(said) == 1


@pytest.mark.parametrize("mark", ["empty", "another", "saved", "files", "metrics"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_projects_recipe_means_the_run_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str, inside: bool
) -> None:
    """Its folder has folders and files of the names that a run's have."""
    project = tmp_path / "project"
    own = "checkpoints/exp1" if inside else "project/checkpoints/exp1"
    write(project, f'{GOOD}run = "{own}"\n', "recipe.toml")
    if mark == "another":
        leave(project / "checkpoints/exp0", "checkpoints")
    elif mark == "saved":
        leave(project / "checkpoints/exp1", "checkpoints")
        leave(project, "checkpoints")
    elif mark == "files":
        for name in ("history.jsonl", "metrics.jsonl"):
            (project / name).mkdir()
    else:
        (project / "checkpoints").mkdir()
        if mark == "metrics":
            (project / "metrics.jsonl").write_text('{"accuracy": 1}\n')
    monkeypatch.chdir(project if inside else tmp_path)
    path = Path("recipe.toml" if inside else "project/recipe.toml")
    assert load_recipe(path).train.run == own


def test_other_recipes_keep_the_run_that_they_name(run: Recipe, tmp_path: Path) -> None:
    """A recipe of a corpus, and one under another name within a run."""
    corpus = write(tmp_path / "data/corpus", GOOD + 'run = "runs/z"\n', "recipe.toml")
    assert load_recipe(corpus).train.run == "runs/z"
    other = write(tmp_path / "runs/first", GOOD + 'run = "runs/z"\n', "other.toml")
    assert load_recipe(other).train.run == "runs/z"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "runs/first")
    assert load_recipe(link / "recipe.toml") == run
