"""Load a trained model from a checkpoint, with its task and its tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mpillm.comm.failure import on_root
from mpillm.models.model_catalog import read_spec
from mpillm.models.part_module import PartModule
from mpillm.system.console import Console
from mpillm.tasks import task_catalog
from mpillm.tasks.task import Task
from mpillm.tasks.task_catalog import make_task
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.tokenizer import Tokenizer
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.finding import find
from mpillm.weights.names import name_tensors

if TYPE_CHECKING:
    from mpi4py import MPI

TOKENIZER = "tokenizer.json"


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
            "tokenizer": dict(manifest.tokenizer),
            "versions": {"torch": torch.__version__},
        }
        # Rank 0 writes the texts, and a missing file is reported before the first step.
        tokenizer = on_root(comm, lambda: manifest.load_tokenizer().to_json())
        return cls(facts, {TOKENIZER: tokenizer})


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
    checkpoint = find(path, comm, console)
    model = read_spec(checkpoint.facts["recipe"]["model"]).build()
    checkpoint.load(model_tensors(model))
    facts = checkpoint.facts["tokenizer"]
    tokenizer = Tokenizer.from_json(checkpoint.text(TOKENIZER), facts["name"], facts["end_of_text"])
    task = make_task(checkpoint.facts["recipe"].get("task", {}).get("name", task_catalog.DEFAULT))
    return Loaded(model.eval(), task, tokenizer, checkpoint)


def model_tensors(model: PartModule) -> dict[str, torch.Tensor]:
    """Collect a model's weights by their names in a checkpoint, a tied weight once."""
    return name_tensors(dict(model.named_weights()), {}, {}, ())
