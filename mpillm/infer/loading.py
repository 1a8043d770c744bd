"""From a checkpoint to something that computes: the model with its weights, and its tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpillm.models.model_catalog import read_spec
from mpillm.models.part_module import PartModule
from mpillm.system.console import Console
from mpillm.tasks import task_catalog
from mpillm.tasks.task import Task
from mpillm.tasks.task_catalog import make_task
from mpillm.tokens.tokenizer import Tokenizer
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.finding import find

if TYPE_CHECKING:
    from mpi4py import MPI

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Loaded:
    model: PartModule
    task: Task
    tokenizer: Tokenizer
    checkpoint: Checkpoint


def load(path: Path, comm: "MPI.Intracomm", console: Console) -> Loaded:
    """The model and tokenizer of a run (its newest whole checkpoint) or of one checkpoint. Every rank calls it.

    Raises CheckpointError or MismatchError.
    """
    checkpoint = find(path, comm, console)
    model = read_spec(checkpoint.facts["recipe"]["model"]).build()
    checkpoint.load(model_tensors(model))
    facts = checkpoint.facts["tokenizer"]
    tokenizer = Tokenizer.from_json(checkpoint.text(TOKENIZER), facts["name"], facts["end_of_text"])
    task = make_task(checkpoint.facts["recipe"].get("task", {}).get("name", task_catalog.DEFAULT))
    return Loaded(model.eval(), task, tokenizer, checkpoint)


def model_tensors(model: PartModule) -> dict[str, torch.Tensor]:
    """A model's weights by their names in a checkpoint (`model/layers/0/attention/query/weight`), a tied one once."""
    return weight_tensors(dict(model.named_weights()))


def weight_tensors(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights, by their names in the whole model, by their names in a checkpoint."""
    return {f"model/{name.replace('.', '/')}": weight.detach() for name, weight in weights.items()}
