"""A recipe: what to train, on what, and how. Its sections live beside their users; this file only collects them."""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, MinLen

from mpillm.errors import RecipeError, UsageError
from mpillm.launch.walltime import seconds_of
from mpillm.models.config import SHAPES, DecoderConfig
from mpillm.parallel.settings import ParallelSettings
from mpillm.train.lr_schedule import OptimizerSettings

Positive = Annotated[int, Gt(0)]
Many = Annotated[int, Ge(0)]


@dataclass(frozen=True)
class DataSettings:
    path: Annotated[str, MinLen(1)]
    """The folder that `mpillm prepare` wrote."""
    document_mask: bool = False
    """Let a position attend only to its own document."""


@dataclass(frozen=True)
class TrainSettings:
    """Counts are in steps and, for batches, in sequences of `model.context` tokens."""

    run: str = ""
    """The folder of the run; empty: `runs/` and the recipe's name."""
    steps: Positive = 1000
    batch: Positive = 32
    """Sequences a step over all ranks."""
    microbatch: Many = 0
    """Sequences that a rank computes at once; 0: all of its share, or in a pipeline a fitting part of it."""
    seed: Many = 0
    fixed_order: bool = False
    """Sum gradients in one order whatever the layout, so that the bits are the same; a little slower."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: products in bfloat16, weights and sums in float32."""
    evaluate_every: Many = 0
    """0: only at the end."""
    save_every: Many = 0
    """0: only at the end."""
    keep: Positive = 3
    """How many checkpoints stay."""
    time_limit: str = ""
    """How long the job may take, such as 1:30:00 or 90m: the run saves and stops before it. Empty: as long as the batch
    system says.
    """

    def __post_init__(self) -> None:
        if self.time_limit:
            try:
                seconds_of(self.time_limit)
            except UsageError as failure:
                raise RecipeError(f"time_limit: {failure}") from failure


@dataclass(frozen=True)
class Recipe:
    data: DataSettings
    model: DecoderConfig = field(default_factory=DecoderConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)

    # pydantic reads it, and hands it on to the sections.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe; `overrides` are texts such as `train.steps=100`. Raises RecipeError naming each fault."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise RecipeError(f"cannot read the recipe {path}: {failure.strerror}") from failure
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as failure:
        raise RecipeError(f"the recipe {path} is not valid TOML: {failure}") from failure
    for override in overrides:
        _override(table, override)
    recipe = parse_recipe(table, str(path))
    run = recipe.train.run or f"runs/{path.stem}"
    return replace(recipe, train=replace(recipe.train, run=run))


def parse_recipe(table: Mapping[str, Any], source: str) -> Recipe:
    """Check a recipe's table and build it. Raises RecipeError; `source` names the table in its message."""
    # Imported here: a verb without a recipe need not wait for pydantic.
    from pydantic import TypeAdapter, ValidationError

    table = {**table, "model": _with_shape(table.get("model", {}))}
    try:
        # As JSON: pydantic's strict mode takes tables for sections only from there.
        return TypeAdapter(Recipe).validate_json(json.dumps(table, default=str))
    except ValidationError as failure:
        # A setting of several types has a fault for each that it is not.
        faults: dict[tuple[int | str, ...], list[str]] = {}
        for error in failure.errors():
            place = error["loc"][:2]
            faults.setdefault(place, []).append(
                _fault(error["type"], place, error["msg"], error["input"])
            )
    texts = [
        " or ".join([first, *(other.rpartition(": ")[2] for other in others)])
        for first, *others in faults.values()
    ]
    raise RecipeError(f"the recipe {source}: " + "; ".join(texts))


def write_recipe(recipe: Recipe) -> str:
    """The recipe as TOML, whole: every setting with its resolved value."""
    sections = []
    for name, section in recipe.to_dict().items():
        lines = [f"{key} = {_toml(value)}" for key, value in section.items()]
        sections.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(sections) + "\n"


def _toml(value: Any) -> str:
    """JSON's words are TOML's, but for two: pairs of surrogates, and a bare delete character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        raise RecipeError(
            f"--set takes section.key=value, such as train.steps=100, and not {override!r}"
        )
    if not isinstance(table.setdefault(section, {}), dict):
        raise RecipeError(f"--set {override}: [{section}] is no section of the recipe")
    table[section][name] = _value(text)


def _value(text: str) -> Any:
    """A TOML value; what is none (a bare word, a path) is taken as text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def _with_shape(section: Any) -> Any:
    """The [model] section with its named shape spelt out beneath its own keys."""
    if not isinstance(section, dict) or "shape" not in section:
        return section
    shape = section["shape"]
    if not isinstance(shape, str) or shape not in SHAPES:
        raise RecipeError(
            f"model.shape = {shape!r} is unknown{_nearest(str(shape), SHAPES)}; shapes: {', '.join(SHAPES)}"
        )
    return {
        **asdict(SHAPES[shape]),
        **{key: value for key, value in section.items() if key != "shape"},
    }


def _fault(kind: str, place: tuple[int | str, ...], message: str, value: object) -> str:
    name = ".".join(str(part) for part in place)
    if kind == "unexpected_keyword_argument":
        known = _known_keys(place[:-1])
        where = f"[{place[0]}]" if len(place) > 1 else "a recipe"
        return f"unknown key {name}{_nearest(str(place[-1]), known)} (known in {where}: {', '.join(known)})"
    if kind in ("missing", "missing_argument"):
        return f"{name} is missing" + (
            "; a recipe needs [data] path" if name.startswith("data") else ""
        )
    if kind == "value_error":
        return f"[{name}] {message.removeprefix('Value error, ')}"
    near = (
        _nearest(str(value), re.findall(r"'([^']+)'", message)) if kind == "literal_error" else ""
    )
    return f"{name} = {value!r}: {message[0].lower()}{message[1:]}{near}"


def _known_keys(place: tuple[int | str, ...]) -> list[str]:
    keys = {section.name: section.type for section in fields(Recipe)}
    if not place:
        return list(keys)
    kind = keys.get(str(place[0]))
    assert isinstance(kind, type)
    assert is_dataclass(kind)
    return [key.name for key in fields(kind)] + (["shape"] if kind is DecoderConfig else [])


def _nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""
