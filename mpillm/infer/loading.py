"""Load a trained model from a checkpoint, with its task and its tokenizer."""

import hashlib
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import CheckpointError, DataError, MismatchError
from mpillm.infer.compress.stored_model import check_stored_model, load_stored
from mpillm.infer.model_source import BASE, ModelSource, open_model
from mpillm.models.adapt import tuned_shapes
from mpillm.models.layers.stored.stored_codes import stored_format
from mpillm.models.model_catalog import read_spec
from mpillm.models.part_module import PartModule, weight_shapes
from mpillm.models.spec import ModelSpec
from mpillm.models.tuning import Tuning, read_tuning
from mpillm.runs.run_files import folder_of_paths
from mpillm.system.console import Console
from mpillm.system.messages import command, some_of
from mpillm.tasks import task_catalog
from mpillm.tasks.task import Task
from mpillm.tasks.task_catalog import make_task
from mpillm.tasks.vocabulary import Lengths, Vocabulary
from mpillm.tokens.chat.chat_template import TEMPLATE
from mpillm.tokens.dataset_folder import is_dataset
from mpillm.tokens.manifest import NAME as MANIFEST
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.pairs.pair_reader import open_of as open_of
from mpillm.tokens.tokenizer import Tokenizer
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.finding import find
from mpillm.weights.names import weight_name

if TYPE_CHECKING:
    from mpi4py import MPI

TOKENIZER = "tokenizer.json"
# By name: a dtype (`float32`) and a shape.
StoredShapes = Mapping[str, tuple[str, tuple[int, ...]]]
# The facts that every checkpoint of a run has, by place, with their types.
FACTS: Mapping[str, type] = MappingProxyType(
    {
        "data": str,
        "recipe.data.path": str,
        "recipe.model": dict,
        "recipe.optimizer": dict,
        "recipe.train.seed": int,
        "recipe.train.batch": int,
        "tokenizer.name": str,
        "tokenizer.sha256": str,
        "tokenizer.end_of_text": str,
        "tokenizer.vocab_size": int,
    }
)


@dataclass(frozen=True)
class RunConstants:
    """The facts and texts that are equal in every checkpoint of a run: read once, at its start."""

    facts: Mapping[str, Any]
    texts: Mapping[str, str]

    @classmethod
    def read(
        cls, manifest: Manifest, recipe: Mapping[str, Any], comm: "MPI.Intracomm"
    ) -> "RunConstants":
        """Read them, with the tokenizer of the data. Every rank calls it; rank 0 reads.

        `recipe`: the resolved recipe as a table. Raises DataError or MismatchError on every rank
        where the dataset's tokenizer is missing or another one.
        """
        facts = {
            "seed": recipe["train"]["seed"],
            "recipe": recipe,
            "data": manifest.manifest_hash,
            # Relative paths of the recipe begin here.
            "folder": str(Path.cwd()),
            "tokenizer": dict(manifest.tokenizer),
            **({"classes": list(manifest.classes)} if manifest.classes else {}),
            "versions": {"torch": torch.__version__},
        }
        # Rank 0 writes the texts, and a missing file is reported before the first step.
        tokenizer = on_root(comm, lambda: manifest.load_tokenizer().to_json())
        template = on_root(comm, manifest.load_template)
        if template is None:
            return cls(facts, {TOKENIZER: tokenizer})
        facts["special_tokens"] = template.tokens
        return cls(facts, {TOKENIZER: tokenizer, TEMPLATE: template.text})

    def of_recipe(self, recipe: Mapping[str, Any]) -> "RunConstants":
        """Return them with another recipe: what was left open in it is resolved."""
        return RunConstants({**self.facts, "recipe": recipe}, self.texts)

    def with_facts(self, more: Mapping[str, Any]) -> "RunConstants":
        """Return them with facts of other models, such as BASE."""
        return RunConstants({**self.facts, **more}, self.texts)


@dataclass(frozen=True)
class Loaded:
    model: PartModule
    task: Task
    tokenizer: Tokenizer
    checkpoint: Checkpoint


def load_trained(path: Path, comm: "MPI.Intracomm", console: Console) -> Loaded:
    """Load the model of a run (its newest whole checkpoint) or of one checkpoint, for inference.

    Every rank calls it. Raises CheckpointError or MismatchError.
    """
    checkpoint = find(path, comm, console, check_trained)
    model = read_spec(checkpoint.facts["recipe"]["model"]).build()
    if stored_format(checkpoint.facts) is not None:
        model = load_stored(model, checkpoint)
    elif BASE in checkpoint.facts:
        source = open_model(CheckpointSource(checkpoint), comm, console)
        on_all(comm, lambda: _take(model, source))
    else:
        checkpoint.load(model_tensors(model))
    facts = checkpoint.facts["tokenizer"]
    tokenizer = Tokenizer.from_json(checkpoint.text(TOKENIZER), facts["name"], facts["end_of_text"])
    settings = task_catalog.read_settings(checkpoint.facts["recipe"].get("task", {}))
    vocabulary = _with_classes(tokenizer.vocabulary, checkpoint.facts.get("classes", []))
    task = make_task(settings.name, settings, vocabulary, Lengths.of(model.spec))
    return Loaded(model.eval(), task, tokenizer, checkpoint)


def read_vocabulary(manifest: Manifest, comm: "MPI.Intracomm") -> Vocabulary:
    """Read the ids of a dataset. Every rank calls it; rank 0 reads.

    Raises DataError or MismatchError on every rank where its tokenizer is missing or another one.
    """
    return on_root(
        comm, lambda: _with_classes(manifest.load_tokenizer().vocabulary, manifest.classes)
    )


def _with_classes(vocabulary: Vocabulary, classes: Sequence[str]) -> Vocabulary:
    return replace(vocabulary, classes=tuple(classes))


def check_trained(checkpoint: Checkpoint) -> StoredShapes:
    """Check the facts, the tokenizer and the names of a run's checkpoint against its own recipe.

    Returns the dtype and the shape of each weight, by its name in the module. Raises
    CheckpointError where the checkpoint is damaged, MismatchError where this mpillm does not know
    the model's settings.
    """
    _check_facts(checkpoint)
    facts = checkpoint.facts
    spec = read_spec(facts["recipe"]["model"])
    weights = _check_weights(checkpoint, spec, read_tuning(facts["recipe"]))
    known = facts["tokenizer"]
    text = checkpoint.text(TOKENIZER)
    if hashlib.sha256(text.encode()).hexdigest() != known["sha256"]:
        raise CheckpointError(
            f"{checkpoint.folder / TOKENIZER} is not the tokenizer that the model was trained "
            "with: its sha256 differs; use another checkpoint"
        )
    # A model of pictures has no vocabulary.
    if known["vocab_size"] > spec.vocab_size and spec.vocab_size:
        raise CheckpointError(
            f"{checkpoint.folder} has a tokenizer of {known['vocab_size']:,} tokens and a model "
            f"of {spec.vocab_size:,}; use another checkpoint"
        )
    return weights


def _check_facts(checkpoint: Checkpoint) -> None:
    """Check that the facts of a run are there, each of its type. Raises CheckpointError."""
    facts: Mapping[str, Any] = checkpoint.facts
    for place, kind in FACTS.items():
        value: Any = facts
        for key in place.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if type(value) is not kind:
            raise CheckpointError(
                f"{checkpoint.folder} was not written by training, or is damaged: its fact "
                f"{place} is {reprlib.repr(value)}; use another checkpoint"
            )


def _check_weights(checkpoint: Checkpoint, spec: ModelSpec, tuning: Tuning) -> StoredShapes:
    """Return the weights' shapes. Raises CheckpointError unless each is stored in its own.

    Of adapters the weights of the base are not stored.
    """
    if stored_format(checkpoint.facts) is not None:
        return check_stored_model(checkpoint, spec)
    if tuning.adapter.used:
        trained = tuned_shapes(spec, tuning).trained
        check_stored(checkpoint, {weight_name(name): wanted for name, wanted in trained.items()})
        return trained
    stored = checkpoint.tensors
    count = sum(math.prod(t.shape) for name, t in stored.items() if name.startswith("model/"))
    # Compared first: a wrong size must not be allocated, nor a wrong number of blocks be built.
    if spec.blocks > len(stored) or spec.parameters > 2 * count:
        raise CheckpointError(
            f"{checkpoint.folder} holds {count:,} parameters, its recipe asks for "
            f"{spec.parameters:,}; use another checkpoint"
        )
    weights = weight_shapes(spec)
    check_stored(checkpoint, {weight_name(name): wanted for name, wanted in weights.items()})
    return weights


def check_stored(checkpoint: Checkpoint, wanted_by_name: StoredShapes) -> None:
    """Raise CheckpointError unless each named tensor is stored with its dtype and shape."""
    for full, wanted in wanted_by_name.items():
        found = checkpoint.tensors.get(full)
        if found is None or (found.dtype, found.shape) != wanted:
            what = f"as {found.dtype} {list(found.shape)}" if found else "not at all"
            raise CheckpointError(
                f"{checkpoint.folder} holds {full} {what}, its recipe needs {wanted[0]} "
                f"{list(wanted[1])}; use another checkpoint"
            )


def load_data(checkpoint: Checkpoint, data: Path | None) -> Manifest:
    """Load the manifest of `data`; None: of the dataset that the run was trained on.

    Raises DataError where it is missing, MismatchError where another dataset is in its place.
    """
    if data is not None:
        return Manifest.load(data)
    if "imported" in checkpoint.facts:
        raise DataError(
            f"{checkpoint.folder} was imported and was trained on no dataset of ours: prepare one "
            f"with its tokenizer (`mpillm prepare … --tokenizer {checkpoint.folder}`), and name it "
            "with --data FOLDER"
        )
    named = Path(checkpoint.facts["recipe"]["data"]["path"])
    if not (named / MANIFEST).is_file():
        # Checkpoints of 0.1 record no folder, and a run may have been moved with its data.
        near = folder_of_paths(checkpoint.folder.parent.parent, checkpoint.facts["recipe"])
        folder = near if near and is_dataset(near / named) else checkpoint.facts.get("folder")
        raise DataError(f"the run's dataset {missing_data(named, folder and str(folder))}")
    manifest = Manifest.load(named)
    if manifest.manifest_hash != checkpoint.facts["data"]:
        raise MismatchError(
            f"{named} is another dataset than the run was trained on (its manifest differs); "
            f"give {command(['--data', named])} to take it all the same, or restore the run's own"
        )
    return manifest


def check_classes(checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Raise MismatchError unless the numbers of the dataset's classes are those of the model's.

    Labels that are numbers are those of the model's classes.
    """
    ours, theirs = tuple(checkpoint.facts.get("classes", ())), manifest.classes
    numbers = tuple(map(str, range(len(ours))))
    if not ours or not theirs or theirs in (ours, numbers[: len(theirs)]):
        return
    names = [f"{number} is {name}" for number, name in enumerate(ours)]
    raise MismatchError(
        f"the data {manifest.folder} has the classes {some_of(list(theirs))}, and the model of "
        f"{checkpoint.folder} others, or in another order: {some_of(names)}; prepare the data with "
        "these numbers as labels"
    )


def missing_data(named: Path, folder: Any, option: str = "--data FOLDER") -> str:
    """Say that the dataset `named` is missing; `folder`: where the run was trained, if known."""
    if named.is_absolute() or folder == str(Path.cwd()):
        return f"{named} is missing; restore it, or say where it is now: {option}"
    if not isinstance(folder, str):
        return (
            f"{named} is not here: its path begins where the run was trained; "
            f"go there, or say where it is: {option}"
        )
    return (
        f"{named} is not here: its path begins in {folder}; "
        f"go there (`{command(['cd', folder])}`), or say where it is: {option}"
    )


@torch.no_grad()
def _take(model: PartModule, source: ModelSource) -> None:
    for name, weight in model.named_weights():
        weight.copy_(source.read(name))


def model_tensors(model: PartModule) -> dict[str, torch.Tensor]:
    """Collect a model's weights by their names in a checkpoint, a tied weight once."""
    return {weight_name(name): weight for name, weight in model.named_weights()}
