"""Make a checkpoint of an adapter in PEFT's format, next to its base."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import CheckpointError, MismatchError, UsageError
from mpillm.infer.model_source import BASE, ModelSource, describe_base, open_model
from mpillm.models.adapt import tuned_shapes
from mpillm.models.families.family_catalog import family_of
from mpillm.models.tuning import ALL_WEIGHTS, INFIX, layer_of
from mpillm.system.atomic import make_folder
from mpillm.system.console import Console
from mpillm.system.json_text import read_object
from mpillm.system.messages import explain, some_of, why
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.names import weight_name
from mpillm.weights.open_source import open_source
from mpillm.weights.peft_format import CONFIG, TENSORS, our_names, read_config
from mpillm.weights.places import CHECKPOINTS
from mpillm.weights.safetensors_source import SafetensorsSource
from mpillm.weights.saving import save

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class _ReadAdapter:
    """An adapter of PEFT by our names, and its settings as those of a recipe."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]


def is_adapter(path: Path) -> bool:
    """Return whether `path` is a folder of PEFT's."""
    return (path / CONFIG).is_file()


def import_adapter(
    path: Path, out: Path, base: Path | None, comm: "MPI.Intracomm", console: Console
) -> Path:
    """Write the adapter at `path` as step 0 of the folder `out`; return the checkpoint.

    `base`: a checkpoint that `mpillm import` made, or a run; None: the one that the adapter names.
    Every rank of `comm` calls it. Raises UsageError where there is no base, MismatchError where the
    adapter is of another one.
    """
    config = on_root(comm, lambda: _config(path))
    place = base or Path(str(config.get("base_model_name_or_path")))
    if not comm.bcast(place.exists()):
        raise UsageError(
            f"the base of {path} is {str(place)!r}, which is not here; name a run, or a model that "
            "was made by `mpillm import`: --base FOLDER"
        )
    source = open_source(place, comm, console)
    if not isinstance(source, CheckpointSource):
        raise UsageError(
            f"the base {place} is not imported yet; make a checkpoint of it by "
            f"`mpillm import {place} --out FOLDER`, and name it: --base FOLDER"
        )
    found = open_model(source, comm, console)
    adapter = on_all(comm, lambda: _read(path, config, found))
    recipe = {**source.facts["recipe"], "adapter": adapter.settings}
    facts = {
        **{key: value for key, value in source.facts.items() if key != BASE},
        "step": 0,
        "recipe": recipe,
        BASE: describe_base(source.path.resolve(), found, comm),
        "imported": {**source.facts.get("imported", {}), "from": str(path)},
    }
    checkpoint = source.checkpoint
    texts = on_root(comm, lambda: {name: checkpoint.text(name) for name in checkpoint.texts})
    on_root(comm, lambda: make_folder(out))
    tensors = {weight_name(name): values for name, values in adapter.tensors.items()}
    return save(out / CHECKPOINTS, tensors, facts, texts, comm)


def _config(path: Path) -> dict[str, Any]:
    try:
        return read_object(path / CONFIG)
    except OSError as failure:
        raise CheckpointError(explain(failure, path / CONFIG)) from failure
    except ValueError as failure:
        raise CheckpointError(f"{path / CONFIG}: {why(failure)}") from failure


def _read(path: Path, config: Mapping[str, Any], base: ModelSource) -> _ReadAdapter:
    """Read the tensors, and find the layers that have adapters."""
    where = str(path)
    settings = read_config(config, f"{where}/{CONFIG}")
    source = SafetensorsSource(path / TENSORS)
    places = family_of(base.spec).places(base.spec)
    shapes = {name: info.shape for name, info in source.tensors.items()}
    names = our_names(shapes, places, base.shapes, where)
    tensors = {ours: source.read(theirs).float() for theirs, ours in names.items()}
    layers = tuple(dict.fromkeys(filter(None, map(layer_of, tensors))))
    known = tuned_shapes(base.spec, ALL_WEIGHTS).layers
    if outside := [layer for layer in layers if layer not in known]:
        raise MismatchError(
            f"{where} has adapters of {some_of(outside)}, outside of the blocks, which are not "
            "read; merge it with its base in PEFT, and import the merged model"
        )
    parts = ("a", "b", "magnitude") if settings.method == "dora" else ("a", "b")
    for layer in layers:
        for part in parts:
            if f"{layer}{INFIX}{part}" not in tensors:
                raise MismatchError(f"{where} has no {part} of the adapter of {layer}")
        rank = len(tensors[f"{layer}{INFIX}a"])
        if rank != settings.rank:
            raise MismatchError(
                f"{where} has an adapter of rank {rank} for {layer}, and its {CONFIG} means "
                f"r = {settings.rank}"
            )
    also = tuple(name for name in tensors if not layer_of(name))
    read = replace(settings, targets=layers, also=also)
    return _ReadAdapter(tensors, {name: _plain(value) for name, value in asdict(read).items()})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
