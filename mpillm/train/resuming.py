"""Find where a run continues, refuse what would change its order, and print what has changed."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.errors import MismatchError, MpillmError, UsageError
from mpillm.infer.loading import check_stored, check_trained
from mpillm.models.model_catalog import read_spec
from mpillm.models.tuning import layer_of, read_tuning
from mpillm.runs.folder import METRICS
from mpillm.system.console import Console
from mpillm.tasks import task_catalog
from mpillm.tasks.distillation.distillation_settings import read_distillation
from mpillm.tokens.manifest import Manifest
from mpillm.train.lr_schedule import learning_rate
from mpillm.train.optimizers import optimizer_catalog
from mpillm.train.optimizers.optimizer import OptimizerSettings
from mpillm.train.recipe import Recipe, in_new_spelling, section_classes
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.finding import newest_whole
from mpillm.weights.names import state_name
from mpillm.weights.places import CHECKPOINTS

if TYPE_CHECKING:
    from mpi4py import MPI

# Settings that name a place: two spellings of one folder are no change.
PLACES = ("train.run", "data.path", "distillation.teacher", "parallel.profile")


def find_start(
    recipe: Recipe, manifest: Manifest, comm: "MPI.Intracomm", console: Console, resume: bool
) -> Checkpoint | None:
    """Return the checkpoint from which the run continues; None for its beginning.

    Every rank calls it. Raises UsageError where a new run would overwrite another.
    """
    folder = Path(recipe.train.run)
    if not resume:
        if comm.bcast((folder / METRICS).exists() or (folder / CHECKPOINTS).exists()):
            raise UsageError(
                f"{folder} holds a run already; --resume continues it, or name another train.run"
            )
        return None
    checkpoint = newest_whole(folder, comm, console, _check_resumable)
    if checkpoint is None:
        console.say(f"{folder} has no checkpoint yet: starting at step 1")
        return None
    _check_same_run(recipe, manifest, checkpoint)
    return checkpoint


def say_changes(recipe: Recipe, checkpoint: Checkpoint, console: Console) -> None:
    """Print each setting of the resolved recipe that differs from the checkpoint's."""
    for line in changed_settings(checkpoint.facts["recipe"], recipe):
        console.say(line)
    if line := rising_rate(checkpoint.facts["recipe"], recipe, checkpoint.step):
        console.warn(line)


def _check_resumable(checkpoint: Checkpoint) -> None:
    recipe = checkpoint.facts.get("recipe")
    named = recipe.get("optimizer") if isinstance(recipe, dict) else None
    optimizer = named if isinstance(named, dict) else {}
    name = str(optimizer.get("name", optimizer_catalog.DEFAULT))
    kind = optimizer_catalog.optimizer_class(name)
    weights, tuning = check_trained(checkpoint), read_tuning(checkpoint.facts["recipe"])
    state = {
        state_name(slot, name): ("float32", shape)
        for name, (_, whole) in weights.items()
        if layer_of(name) or not tuning.is_frozen(name)
        for slot, shape in kind.slot_shapes(name, whole).items()
    }
    check_stored(checkpoint, state)


def _check_same_run(recipe: Recipe, manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raise MismatchError unless model, order and data are those of the checkpoint."""
    before, now = dict(checkpoint.facts["recipe"]), recipe.to_dict()
    # Earlier releases wrote fewer keys, such as no `architecture`: their defaults are filled in.
    before["model"] = asdict(read_spec(before["model"]))  # type: ignore[call-overload]
    for section in (before, now):
        tuning = read_tuning(section)
        section["adapter"] = asdict(tuning.adapter)
        section["train"] = {**section["train"], "freeze": list(tuning.freeze)}
        distillation = read_distillation(section.get("distillation"))
        section["distillation"] = {"layers": distillation.compared}
    before["task"] = {"name": task_catalog.DEFAULT, **before.get("task", {})}
    before["optimizer"] = {"name": optimizer_catalog.DEFAULT, **before["optimizer"]}
    kept = {
        "model": now["model"],
        "task": ["name"],
        "optimizer": ["name"],
        "adapter": [key for key in now["adapter"] if key != "dropout"],
        "distillation": ["layers"],
        "train": ["seed", "batch", "freeze"],
    }
    changes = [
        f"{section}.{key} was {before[section].get(key)!r} and is {value!r}"
        for section, keys in kept.items()
        for key in keys
        if before[section].get(key) != (value := now[section][key])
    ]
    if checkpoint.facts["data"] != manifest.manifest_hash:
        changes.append(f"the data {recipe.data.path} is another dataset than the run began with")
    if changes:
        raise MismatchError(
            f"--resume needs the same model, order and data, but {'; '.join(changes)}; "
            "correct the recipe, or name another train.run"
        )


def changed_settings(before: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Say of each setting that differs from those of the checkpoint what it was and is."""
    # As JSON, as the checkpoint has them: its lists are the tuples of settings.
    now, before = json.loads(json.dumps(recipe.to_dict())), in_new_spelling(before)
    classes, lines = section_classes(now), []
    for section, keys in now.items():
        defaults, old = _defaults(classes[section]), before.get(section, {})
        for key, value in keys.items():
            # An earlier release that lacked the key did what is the default now.
            was = json.loads(json.dumps(old.get(key, defaults.get(key, value))))
            name = f"{section}.{key}"
            if was == value or (name in PLACES and _same_place(was, value)):
                continue
            lines.append(f"{name} was {json.dumps(was)}, is {json.dumps(value)}")
    return lines


def _defaults(kind: type) -> dict[str, Any]:
    assert is_dataclass(kind)
    found = {each.name: each.default for each in fields(kind) if each.default is not MISSING}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _same_place(one: object, other: object) -> bool:
    return os.path.realpath(str(one)) == os.path.realpath(str(other)) and bool(one) == bool(other)


def rising_rate(before: Mapping[str, Any], recipe: Recipe, done: int) -> str:
    """Say where the learning rate rises at the restored step, other than in its own warm-up.

    A schedule that got longer, or another rate, makes it jump. Returns "" where it does not.
    """
    old = _optimizer_of(before["optimizer"])
    steps = before["train"].get("steps")
    if old is None or type(steps) is not int or not done:
        return ""
    last, due = (learning_rate(old, step, steps) for step in (done - 1, done))
    new = learning_rate(recipe.optimizer, done, recipe.train.steps)
    if new <= max(last, due) * (1 + 1e-9):
        return ""
    return (
        f"the learning rate rises from {last:.3g} at step {done:,} to {new:.3g} at step "
        f"{done + 1:,}: the schedule is another one now; set optimizer.learning_rate lower "
        "to avoid the jump"
    )


def _optimizer_of(section: Mapping[str, Any]) -> OptimizerSettings | None:
    """Build the optimizer's settings of a checkpoint; None where this mpillm cannot."""
    try:
        kind = optimizer_catalog.optimizer_class(
            str(section.get("name", optimizer_catalog.DEFAULT))
        )
        assert is_dataclass(kind)
        known = {each.name for each in fields(kind)}
        settings = kind(**{key: value for key, value in section.items() if key in known})
        finite = math.isfinite(learning_rate(settings, 0, 1))
    except (MpillmError, TypeError, ValueError, ZeroDivisionError):
        return None
    return settings if finite else None
