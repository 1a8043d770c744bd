from dataclasses import replace
from pathlib import Path

import pytest

from mpillm.errors import RecipeError
from mpillm.models.decoder import SHAPES
from mpillm.train.optimizers.optimizer import GroupRule
from mpillm.train.recipe import OLD_SPELLINGS, Recipe, load_recipe, parse_recipe, write_recipe

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
    rules = (GroupRule('a"*', rate=0.1), GroupRule("b", decay=0.0))
    ruled = replace(recipe, optimizer=replace(recipe.optimizer, groups=rules))
    assert 'groups = [{match = "a\\"*", rate = 0.1}, {match = ' in write_recipe(ruled)
    assert load(tmp_path, write_recipe(ruled)) == ruled
    odd = replace(recipe, train=replace(recipe.train, run="a 'b' \"c\" \\ \x7f é 🦜 $(d)"))
    assert load(tmp_path, write_recipe(odd)) == odd


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stpes=5", r"unknown key train\.stpes, did you mean steps\?"),
        ("trian.steps=5", r"unknown key trian, did you mean train\?"),
        ("model.shap=5", r"did you mean shape\?"),
        ('train.sinks=["loss.pgn"]', "the sinks of metrics are metrics.jsonl, TensorBoard"),
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
        ("optimizer.name=lino", "did you mean lion"),
        ("optimizer.period_factor=0.5", "optimizer.period_factor = 0.5: input should be greater"),
        ("optimizer.schedule=cosine-restarts", r"optimizer\.period is 0; set it to a number"),
        ("optimizer.clip_value=-1", "optimizer.clip_value = -1"),
        ("optimizer.groups=all", "optimizer.groups = 'all': input should be a valid array"),
        ("optimizer.groups=[3]", r"optimizer\.groups\[0\] = 3: input should be an object"),
        ("optimizer.groups=[{}]", r"optimizer\.groups\[0\]\.match is missing"),
        (
            'optimizer.groups=[{match="a"}, {match="b", rat=2}]',
            r"unknown key optimizer\.groups\[1\]\.rat, did you mean rate\? \(known in "
            r"optimizer\.groups\[1\]: match, rate, decay\)",
        ),
        ('optimizer.groups=[{match="a", rate=-1}]', r"groups\[0\]\.rate = -1: input should be gr"),
        ('optimizer.groups=[{match="a", rate=inf}]', r"groups\.rate = inf: a setting is a finite"),
        ("train.noise_scale=-1", "train.noise_scale = -1"),
        ("parallel.allreduce=rong", "did you mean ring"),
        (
            "train.recompute=some",
            "train.recompute = 'some': input should be 'none', 'attention' or 'full', did you "
            "mean none. or input should be a valid integer",
        ),
        ("train.recompute=0", "train.recompute = 0: .* or input should be greater than 0"),
        ("train.recompute=-2", "train.recompute = -2: .* or input should be greater than 0"),
        ("train.recompute=1.5", "train.recompute = 1.5"),
        ("train.recompute=true", "train.recompute = True"),
        ("model.dropout=1", "dropout = 1 is the probability that .* less than 1"),
        ("model.dropout=-0.1", "dropout = -0.1 is the probability"),
        ("model.attention_dropout=1.0", "attention_dropout = 1 is the probability"),
        ("model.embedding_dropout=7", "embedding_dropout = 7 is the probability"),
        ("model.dropout=high", "model.dropout = 'high': input should be a valid number"),
        ("train=5", "--set takes section.key=value"),
        ("train.steps", "--set takes section.key=value"),
        ("data.path=''", "data.path"),
        ("task.label_smoothing=1.0", "task.label_smoothing = 1.0: input should be less than 1"),
        ("task.label_smoothing=-0.1", "input should be greater than or equal to 0"),
        ("task.z_loss=-1e-4", "task.z_loss = -0.0001: input should be greater than or equal to 0"),
        ("task.z_loss=1", "task.z_loss = 1: input should be less than 1"),
        ("task.z_loss=nan", "task.z_loss = nan"),
        ("task.z_los=1e-4", r"unknown key task\.z_los, did you mean z_loss"),
    ],
)
def test_a_fault_is_reported_with_the_nearest_legal_word(
    tmp_path: Path, override: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        load(tmp_path, GOOD, override)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
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


SPELLINGS = [
    (*place.split("."), old, new)
    for place, names in OLD_SPELLINGS.items()
    for old, new in names.items()
]


@pytest.mark.parametrize(("section", "key", "old", "new"), SPELLINGS)
def test_an_old_spelling_is_read_in_recipes_and_refused_on_the_command_line(
    tmp_path: Path, section: str, key: str, old: str, new: str
) -> None:
    recipe = load(tmp_path, f'{GOOD}[{section}]\n{key} = "{old}"\n')
    assert getattr(getattr(recipe, section), key) == new
    assert f'{key} = "{new}"' in write_recipe(recipe)
    words = f"{old!r} is an old spelling; write {section}.{key}={new}"
    with pytest.raises(RecipeError, match=words):
        load(tmp_path, GOOD, f"{section}.{key}={old}")
    assert getattr(getattr(load(tmp_path, GOOD, f"{section}.{key}={new}"), section), key) == new


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a user's own architecture and optimizer, each with a key of its own."""
    (tmp_path / "own_kinds.py").write_text(
        "from dataclasses import dataclass\n"
        "from mpillm.models.decoder import DecoderConfig\n"
        "from mpillm.train.optimizers.adamw import AdamWSettings\n"
        "@dataclass(frozen=True)\n"
        "class Model(DecoderConfig):\n"
        "    twists: int = 1\n"
        "@dataclass(frozen=True)\n"
        "class Optimizer(AdamWSettings):\n"
        "    nesterov: bool = False\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


OWN = """
[model]
architecture = "own_kinds:Model"
twists = 3
[optimizer]
name = "own_kinds:Optimizer"
nesterov = true
[task]
name = "own_kinds:Task"
[data]
path = "x"
"""


def test_plug_ins_bring_keys_of_their_own(tmp_path: Path, plugins: None) -> None:
    recipe = load(tmp_path, OWN)
    assert (recipe.model.twists, recipe.optimizer.nesterov) == (3, True)
    assert recipe.task.name == "own_kinds:Task"
    assert load(tmp_path, write_recipe(recipe)) == recipe
    assert load(tmp_path, OWN, "model.twists=5").model.twists == 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.twits=5", r"unknown key model\.twits, did you mean twists\? \(known in \[model\]"),
        ("optimizer.nestrov=1", r"unknown key optimizer\.nestrov, did you mean nesterov\?"),
        ("model.twists=many", "model.twists = 'many'"),
        ("model.architecture=decodr", "did you mean decoder"),
        ("model.architecture=own_kinds:Missing", "has no Missing"),
        ("model.architecture=pathlib:Path", "must name a class that derives from"),
        ("optimizer.name=adam", "did you mean adamw"),
        ("optimizer.name=pathlib:Path", "must name a class that derives from"),
        ("task.name=causal", r"task.name = 'causal' is unknown; tasks: causal-lm"),
        ("task.nam=causal-lm", r"unknown key task\.nam, did you mean name\?"),
    ],
)
def test_a_wrong_plug_in_is_reported(
    tmp_path: Path, plugins: None, override: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        load(tmp_path, OWN, override)


def test_the_task_is_causal_lm_unless_named() -> None:
    task = parse_recipe({"data": {"path": "x"}}, "x").task
    assert (task.name, task.label_smoothing, task.z_loss) == ("causal-lm", 0.0, 0.0)
