"""The recipe: what to train, on which data, and how.

The settings class of a section is defined in the room that uses it; this file collects them. The
keys `model.architecture` and `optimizer.name` select the class of their section: an entry of a
catalogue, or a plug-in.
"""

import difflib
import json
import math
import re
import reprlib
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, MinLen

from mpillm.comm.communicator import silent
from mpillm.errors import RecipeError, UsageError
from mpillm.launch.walltime import seconds_of
from mpillm.models import model_catalog
from mpillm.models.spec import ModelSpec
from mpillm.models.tuning import AdapterSettings, Tuning, freeze_patterns
from mpillm.parallel.settings import ParallelSettings
from mpillm.runs import sink_catalog
from mpillm.system.messages import command
from mpillm.system.plugins import is_plugin
from mpillm.tasks.distillation.distillation_settings import DistillationSettings
from mpillm.tasks.task_catalog import TaskSettings, check_read
from mpillm.train.optimizers import optimizer_catalog
from mpillm.train.optimizers.optimizer import OptimizerSettings
from mpillm.train.recipe_file import expand_home, own_run, read_table

if TYPE_CHECKING:
    from mpillm.tasks.task import Task

# What a signed 64-bit number holds, in torch and in MPI.
LARGEST = 1 << 63
# A wrong value in a message: enough to find it.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
Positive = Annotated[int, Gt(0)]
Many = Annotated[int, Ge(0)]
Table = dict[str, Any]

# Spellings of earlier releases, by section.key: read in existing recipes and run folders, refused
# on the command line.
OLD_SPELLINGS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "parallel.overlap": {"behind": "during"},
        "parallel.allreduce": {"native": "mpi"},
    }
)


@dataclass(frozen=True)
class DataSettings:
    path: Annotated[str, MinLen(1)]
    """The folder that `mpillm prepare` wrote."""
    document_mask: bool = False
    """Let a position attend only to its own document."""
    pack: bool = True
    """Let several conversations share a row, none of which attends to another."""

    def numbers_documents(self, task: "Task") -> bool:
        """Return whether rows of `task` come with the number of each position's document."""
        return self.pack if task.packs else self.document_mask


@dataclass(frozen=True)
class TrainSettings:
    """Counts are in steps and, for batches, in sequences of `model.context` tokens."""

    run: str = ""
    """The folder of the run; empty: `runs/` and the recipe's name."""
    start_from: str = ""
    """A run, a checkpoint or a Hugging Face folder: training begins with its weights, and takes its
    settings where [model] gives no other.
    """
    steps: Positive = 1000
    batch: Positive = 32
    """Sequences a step over all ranks."""
    microbatch: Many = 0
    """Sequences that a rank computes at once; 0: all of its share, or in a pipeline a fitting part
    of it.
    """
    seed: Many = 0
    fixed_order: bool = False
    """Sum gradients in one order whatever the layout, so that the bits are the same; a little
    slower.
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU a rank where all ranks see one. ROCm builds of torch call theirs cuda, too."""
    gpus: str = ""
    """The GPUs of a node's ranks in turn, as they see them, such as 0,2,1,3; empty: in order."""
    share_gpu: bool = False
    """Let several ranks compute on one GPU."""
    dtype: Literal["default", "auto", "float32", "bfloat16", "float16"] = "default"
    """Of weights, activations and messages between stages; the optimizer steps on float32 masters,
    and sums stay in float32. default: float32 on CPUs, auto on GPUs. auto: by a timed product.
    """
    reduce_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the sums of gradients over ranks: a lower one halves their messages."""
    compile: bool = False
    """Compile the model's layers by torch.compile: a minute at the first start."""
    tf32: bool = False
    """Let float32 products of a GPU round their factors to 10 bits."""
    recompute: Literal["none", "attention", "full"] | Positive = "none"
    """Activations that the backward pass computes again instead of keeping them: of the attention,
    of each layer, or of every n-th layer.
    """
    freeze: Many | tuple[str, ...] = 0
    """Weights that stay as they are: so many of the first layers, with the embeddings ahead of
    them, or globs on names.
    """
    keep_zeros: bool = False
    """Let weights of linear layers that are 0 when the run begins stay 0: those of a pruned model
    that `mpillm compress` made.
    """
    noise_scale: Many = 0
    """Measure the gradient noise scale every so many steps; 0: never."""
    evaluate_every: Many = 0
    """0: only at the end."""
    save_every: Many = 0
    """0: only at the end."""
    keep: Positive = 3
    """How many checkpoints stay."""
    keep_best: str = ""
    """The number of an evaluation, such as validation_loss or validation_accuracy, whose best
    checkpoint stays, too; empty: none.
    """
    early_stopping_patience: Literal["none"] | Positive = "none"
    """End the run after so many evaluations in a row that were no better than the best one."""
    sinks: tuple[str, ...] = sink_catalog.DEFAULT
    """Where metrics go next to metrics.jsonl; a sink of your own is named package.module:Name."""
    time_limit: str = ""
    """How long the job may take, such as 1:30:00 or 90m: the run saves and stops before it. Empty:
    as long as the batch system says.
    """

    def __post_init__(self) -> None:
        if self.time_limit:
            try:
                seconds_of(self.time_limit)
            except UsageError as failure:
                raise RecipeError(f"time_limit: {failure}") from failure
        if self.gpus and not re.fullmatch(r"\d{1,4}(,\d{1,4})*", self.gpus, re.ASCII):
            raise RecipeError(
                f"gpus = {self.gpus!r}: name the GPUs by number with commas between, such as 0,2,1"
            )
        for name in self.sinks:
            if name not in sink_catalog.SINKS and not is_plugin(name):
                raise RecipeError(
                    f"sinks names {name!r}, and the sinks of metrics are "
                    f"{', '.join(sink_catalog.SINKS)}, or your own as package.module:Name"
                )
        if self.best_metric and not self.evaluate_every:
            raise RecipeError(
                "keep_best and early_stopping_patience compare evaluations, and evaluate_every = 0 "
                "makes one at the end; set evaluate_every"
            )
        if self.fixed_order and self.reduce_dtype != "float32":
            raise RecipeError(
                "fixed_order = true keeps the bits of sums in float32, and reduce_dtype = "
                f"{self.reduce_dtype} rounds them by layout; leave one of them out"
            )

    @property
    def best_metric(self) -> str:
        """The number by which the best checkpoint is kept; "": none is."""
        stops = self.early_stopping_patience != "none"
        return self.keep_best or ("validation_loss" if stops else "")


@dataclass(frozen=True)
class Recipe:
    data: DataSettings
    model: ModelSpec = field(
        default_factory=lambda: model_catalog.spec_class(model_catalog.DEFAULT)()
    )
    task: TaskSettings = field(default_factory=TaskSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    optimizer: OptimizerSettings = field(
        default_factory=lambda: optimizer_catalog.optimizer_class(optimizer_catalog.DEFAULT)()
    )
    train: TrainSettings = field(default_factory=TrainSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)

    @property
    def tuning(self) -> Tuning:
        """The weights that are trained."""
        return Tuning(self.adapter, freeze_patterns(self.train.freeze))

    def to_dict(self) -> dict[str, Any]:
        return {section.name: asdict(getattr(self, section.name)) for section in fields(self)}


def load_recipe(
    path: Path, overrides: Sequence[str] = (), say: Callable[[str], None] = silent
) -> Recipe:
    """Read a TOML recipe; `overrides` are texts such as `train.steps=100`.

    A recipe in a run's folder means that run, whatever folder it names: `say` receives a line
    where they differ. Raises RecipeError naming each fault.
    """
    table = read_table(path)
    for override in overrides:
        _override(table, override)
    _take_settings(table)
    recipe = parse_recipe(table, str(path))
    named = expand_home(recipe.train.run) or f"runs/{path.stem}"
    # A folder that was asked for on the command line is meant as it is.
    asked = any(each.partition("=")[0].strip() == "train.run" for each in overrides)
    run = named if asked else own_run(path, named)
    if run != named:
        say(f"the run is {run}, where its recipe is: the recipe names {named}")
    return replace(
        recipe,
        train=replace(recipe.train, run=run),
        data=replace(recipe.data, path=expand_home(recipe.data.path)),
        distillation=replace(recipe.distillation, teacher=expand_home(recipe.distillation.teacher)),
        parallel=replace(recipe.parallel, profile=expand_home(recipe.parallel.profile)),
    )


def _take_settings(table: Table) -> None:
    """Fill [model] with the settings of `train.start_from`, where the recipe names no architecture:
    a resolved recipe names all. Raises CheckpointError where they cannot be read.
    """
    train, model = table.get("train"), table.get("model", {})
    if not isinstance(train, dict) or not isinstance(model, dict):
        return
    start = train.get("start_from")
    if not isinstance(start, str) or not start:
        return
    train["start_from"] = start = expand_home(start)
    if "architecture" not in model and "shape" not in model:
        # Imported here: the index of a checkpoint loads torch, which a login node may lack.
        from mpillm.weights.model_settings import model_settings

        table["model"] = model_settings(Path(start)).inherited(model)


def parse_recipe(table: Mapping[str, Any], source: str) -> Recipe:
    """Check a recipe's table and build it. Raises RecipeError; `source` names the table in its
    message.
    """
    # Imported here: loading pydantic would delay every verb that reads no recipe.
    from pydantic import TypeAdapter, ValidationError

    if impossible := _impossible_values(table):
        raise RecipeError(f"the recipe {source}: " + "; ".join(impossible))
    table = {**in_new_spelling(table), "model": _with_shape(table.get("model", {}))}
    classes = section_classes(table)
    try:
        # As JSON: in strict mode pydantic accepts a table for a dataclass only from JSON.
        read: Any = TypeAdapter(_table_class(classes)).validate_json(json.dumps(table, default=str))
    except ValidationError as failure:
        # A setting of several types gives one error a type; they become one text.
        faults: dict[tuple[int | str, ...], list[str]] = {}
        for error in failure.errors():
            # A number is the place of a table in a list: its key belongs to the place.
            place = error["loc"]
            place = place[:4] if len(place) > 2 and isinstance(place[2], int) else place[:2]
            text = _fault(error["type"], place, error["msg"], error["input"], classes)
            faults.setdefault(place, []).append(text)
    else:
        check_read(read.task)
        return Recipe(**{name: getattr(read, name) for name in classes})
    texts = [
        " or ".join([first, *(other.rpartition(": ")[2] for other in others)])
        for first, *others in faults.values()
    ]
    raise RecipeError(f"the recipe {source}: " + "; ".join(texts))


def _impossible_values(table: Mapping[str, Any]) -> list[str]:
    """List the values that no setting can have, those of plug-ins included."""
    faults = []
    for name, value in _leaves("", table):
        if isinstance(value, float) and not math.isfinite(value):
            faults.append(f"{name} = {value}: a setting is a finite number")
        elif isinstance(value, int) and not -LARGEST <= value < LARGEST:
            faults.append(f"{name} has {value.bit_length()} bits: a setting is less than 2^63")
        elif isinstance(value, str) and not _is_text(value):
            faults.append(
                f"{name} = {value!r}: a text is UTF-8 without NUL; rename the file or folder"
            )
    return faults


def _leaves(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            name = f"{place}.{key}" if place else str(key)
            # A key is a text, too.
            yield name, str(key)
            yield from _leaves(name, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(place, inner)
    else:
        yield place, value


def _is_text(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _table_class(classes: Mapping[str, type]) -> type:
    """Make the class that pydantic checks: a section a field, of its class; only [data] has no
    defaults.
    """
    sections = [
        (name, kind) if name == "data" else (name, kind, field(default_factory=kind))
        for name, kind in classes.items()
    ]
    # pydantic applies the configuration to the sections too.
    strict = {"__pydantic_config__": {"extra": "forbid", "strict": True}}
    return make_dataclass("RecipeTable", sections, namespace=strict, frozen=True)


def section_classes(table: Mapping[str, Any]) -> dict[str, type]:
    """Return the class of each section; [model] and [optimizer] name theirs. Raises RecipeError for
    unknown names.
    """
    return {
        "data": DataSettings,
        "model": model_catalog.spec_class(
            _name_in(table, "model", "architecture", model_catalog.DEFAULT)
        ),
        "task": TaskSettings,
        "adapter": AdapterSettings,
        "distillation": DistillationSettings,
        "optimizer": optimizer_catalog.optimizer_class(
            _name_in(table, "optimizer", "name", optimizer_catalog.DEFAULT)
        ),
        "train": TrainSettings,
        "parallel": ParallelSettings,
    }


def _name_in(table: Mapping[str, Any], section: str, key: str, default: str) -> str:
    keys = table.get(section)
    return str(keys.get(key, default)) if isinstance(keys, dict) else default


def write_recipe(recipe: Recipe) -> str:
    """Return the recipe as TOML, whole: every setting with its resolved value."""
    sections = []
    for name, section in recipe.to_dict().items():
        lines = [f"{key} = {_toml(value)}" for key, value in section.items()]
        sections.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(sections) + "\n"


def _toml(value: Any) -> str:
    """Write a value in TOML: as JSON, without surrogate pairs and with delete escaped.

    A table is written in line, without its keys that are not set.
    """
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        pairs = (f"{key} = {_toml(inner)}" for key, inner in value.items() if inner is not None)
        return f"{{{', '.join(pairs)}}}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _override(table: Table, override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        raise RecipeError(
            f"--set takes section.key=value, such as train.steps=100, and not {override!r}"
        )
    if not isinstance(table.setdefault(section, {}), dict):
        raise RecipeError(f"--set {override}: [{section}] is not a section of the recipe")
    value = _value(text)
    renamed = OLD_SPELLINGS.get(f"{section}.{name}", {})
    if isinstance(value, str) and value in renamed:
        raise RecipeError(
            f"--set {override}: {value!r} is an old spelling; "
            f"write {section}.{name}={renamed[value]}"
        )
    table[section][name] = value


def in_new_spelling(table: Mapping[str, Any]) -> Table:
    """Replace the old spellings of values."""
    renewed = {name: dict(keys) if isinstance(keys, dict) else keys for name, keys in table.items()}
    for place, names in OLD_SPELLINGS.items():
        section, _, key = place.partition(".")
        keys = renewed.get(section)
        if isinstance(keys, dict) and isinstance(keys.get(key), str):
            keys[key] = names.get(keys[key], keys[key])
    return renewed


def _value(text: str) -> Any:
    """Read a TOML value; return any other text (a bare word, a path) as it is."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, KeyError, RecursionError):
        return text


def _with_shape(section: Any) -> Any:
    """Replace the [model] section's `shape` by the settings it names; own keys override them."""
    if not isinstance(section, dict) or "shape" not in section:
        return section
    shape = section["shape"]
    shapes = model_catalog.named_shapes(str(section.get("architecture", "")))
    if not isinstance(shape, str) or shape not in shapes:
        raise RecipeError(
            f"model.shape = {shape!r} is unknown{_nearest(str(shape), shapes)}; "
            f"shapes: {', '.join(shapes)}"
        )
    own = {key: value for key, value in section.items() if key != "shape"}
    settings = shapes[shape]
    assert is_dataclass(settings)
    return {**asdict(settings), **own}


def _fault(
    kind: str,
    place: tuple[int | str, ...],
    message: str,
    value: object,
    classes: Mapping[str, type],
) -> str:
    name = _dotted(place)
    if kind == "unexpected_keyword_argument":
        known = _known_keys(place[:-1], classes)
        where = f"[{place[0]}]" if len(place) == 2 else _dotted(place[:-1]) or "a recipe"
        near = _nearest(str(place[-1]), known)
        return f"unknown key {name}{near} (known in {where}: {', '.join(known)})"
    if kind in ("missing", "missing_argument"):
        remedy = "; a recipe needs [data] path" if name.startswith("data") else ""
        return f"{name} is missing{remedy}"
    if kind == "value_error":
        return f"[{name}] {message.removeprefix('Value error, ')}"
    if kind == "string_type" and isinstance(value, int | float):
        return f"{name} = {_toml(value)}: {_quoting(name, value)}"
    choices = re.findall(r"'([^']+)'", message)
    near = _nearest(str(value), choices) if kind == "literal_error" else ""
    return f"{name} = {_SHORT.repr(value)}: {message[0].lower()}{message[1:]}{near}"


def _dotted(place: tuple[int | str, ...]) -> str:
    """Write a place as `section.key`, or `section.key[0].inner`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).removeprefix(".")


def _quoting(name: str, value: object) -> str:
    """Say how a text that looks like a number is written; a bare number is no time."""
    if name == "train.time_limit":
        try:
            seconds_of(str(value))
        except UsageError as failure:
            return str(failure)
    value = str(value).lower() if isinstance(value, bool) else value
    text = f'{name}="{value}"'
    return (
        f'it should be a text; write {name.rpartition(".")[2]} = "{value}" in the recipe, '
        f"or {command(['--set', text])}"
    )


def _known_keys(place: tuple[int | str, ...], classes: Mapping[str, type]) -> list[str]:
    if not place:
        return list(classes)
    kind = classes[str(place[0])]
    assert is_dataclass(kind)
    if len(place) > 1:
        # The class of the tables in the list at `section.key`.
        found = next(get_args(key.type) for key in fields(kind) if key.name == place[1])
        return [key.name for key in fields(found[0])]
    return [key.name for key in fields(kind)] + ["shape"] * (place[0] == "model")


def _nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""
