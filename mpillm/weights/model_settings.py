"""The settings of a model at rest, read without its weights."""

from pathlib import Path

from mpillm.errors import CheckpointError, MpillmError, RecipeError
from mpillm.models.families.family_catalog import find_family
from mpillm.models.model_catalog import read_spec
from mpillm.models.spec import ModelSpec
from mpillm.system.json_text import read_object
from mpillm.system.messages import why
from mpillm.weights.index import read_index
from mpillm.weights.places import CHECKPOINTS, INDEX, checkpoint_folders

CONFIG = "config.json"


def model_settings(path: Path) -> ModelSpec:
    """Return the settings of the model at `path`: a run, a checkpoint or a Hugging Face folder.

    Raises CheckpointError where there is none, or its settings are none of ours.
    """
    if (path / INDEX).exists():
        return _of_checkpoint(path)
    if found := checkpoint_folders(path / CHECKPOINTS):
        return _of_checkpoint(list(found.values())[-1])
    config = path / CONFIG
    if not config.exists():
        raise CheckpointError(
            f"{path} is no model: it has neither {CHECKPOINTS}/ nor {CONFIG}; name a run's folder, "
            "a checkpoint or a Hugging Face folder"
        )
    try:
        value = read_object(config)
        return find_family(value).spec(value)
    except (OSError, ValueError, RecipeError) as failure:
        raise CheckpointError(f"{config}: {why(failure)}") from failure


def _of_checkpoint(folder: Path) -> ModelSpec:
    recipe = read_index(folder).facts.get("recipe")
    model = recipe.get("model") if isinstance(recipe, dict) else None
    if not isinstance(model, dict):
        raise CheckpointError(f"{folder} records no model; use another checkpoint")
    try:
        return read_spec(model)
    except MpillmError as failure:
        raise CheckpointError(f"{folder}: {failure}") from failure
