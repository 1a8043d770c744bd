from dataclasses import replace
from pathlib import Path

import pytest

from mpillm.errors import RecipeError
from mpillm.models.decoder import SHAPES
from mpillm.train.recipe import Recipe, load_recipe, write_recipe

GOOD = """
[model]
shape = "tiny"
context = 64
[data]
path = "prepared/x"
[train]
steps = 10
"""


def load(tmp_path: Path, text: str = GOOD, *overrides: str) -> Recipe:
    path = tmp_path / "good.toml"
    path.write_text(text)
    return load_recipe(path, overrides)


def test_a_shape_is_the_ground_for_the_models_own_keys(tmp_path: Path) -> None:
    model = load(tmp_path).model
    assert (model.width, model.context) == (SHAPES["tiny"].width, 64)


def test_overrides_replace_keys_by_type(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        GOOD,
        "train.steps=20",
        "optimizer.learning_rate=3e-4",
        "train.run=runs/a b",
        "model.tied=false",
        "optimizer.schedule=linear",
        'data.path="elsewhere"',
    )
    assert (recipe.train.steps, recipe.optimizer.learning_rate, recipe.train.run) == (
        20,
        3e-4,
        "runs/a b",
    )
    assert (recipe.model.tied, recipe.optimizer.schedule, recipe.data.path) == (
        False,
        "linear",
        "elsewhere",
    )


def test_a_run_is_named_after_its_recipe(tmp_path: Path) -> None:
    assert load(tmp_path).train.run == "runs/good"


def test_a_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert load(tmp_path, write_recipe(recipe)) == recipe
    odd = replace(recipe, train=replace(recipe.train, run="a 'b' \"c\" \\ \x7f é 🦜 $(d)"))
    assert load(tmp_path, write_recipe(odd)) == odd


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stpes=5", r"unknown key train\.stpes, did you mean steps\?"),
        ("trian.steps=5", r"unknown key trian, did you mean train\?"),
        ("model.shap=5", r"did you mean shape\?"),
        ("train.steps=many", "train.steps = 'many': input should be a valid integer"),
        ("train.steps=1.5", "train.steps = 1.5"),
        ("train.steps=true", "train.steps = True"),
        ("train.steps=0", "train.steps = 0: input should be greater than 0"),
        (
            "parallel.stages=even",
            "parallel.stages = 'even': input should be 'auto' or input should be a valid array",
        ),
        ("parallel.pipeline=0", "parallel.pipeline = 0: input should be greater than 0"),
        ("model.heads=7", "width 128 is not divisible by 7 heads; use a width of 126 or 133"),
        ("model.shape=tny", "model.shape = 'tny' is unknown, did you mean tiny"),
        ("optimizer.schedule=cosin", "did you mean cosine"),
        ("optimizer.beta1=1.0", "optimizer.beta1 = 1.0"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate"),
        ("parallel.allreduce=rong", "did you mean ring"),
        ("train=5", "--set takes section.key=value"),
        ("train.steps", "--set takes section.key=value"),
        ("data.path=''", "data.path"),
    ],
)
def test_a_fault_is_told_with_the_nearest_legal_word(
    tmp_path: Path, override: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        load(tmp_path, GOOD, override)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"learning_rte.*stpes"):
        load(tmp_path, GOOD, "train.stpes=5", "optimizer.learning_rte=1.0")


def test_a_recipe_needs_its_data(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"needs \[data\] path"):
        load(tmp_path, "[train]\nsteps = 3\n")


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*nowhere\.toml: No such file"):
        load_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(RecipeError, match="is not valid TOML"):
        load(tmp_path, "[train\n")


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("jobs/recipes/*.toml")), ids=lambda p: p.name
)
def test_the_recipes_that_we_ship_are_good(path: Path) -> None:
    assert load_recipe(path).data.path
