"""The reference of answers that are written in training: a frozen copy of the weights at the start.

DPO scores the answers of its data once, before the first step. These answers are new in each step,
so that the weights have to stay.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mpillm.comm.failure import on_all
from mpillm.errors import MismatchError
from mpillm.infer.model_source import ModelSource, describe_base, open_model
from mpillm.models.part_module import PartModule, build_without_values
from mpillm.models.spec import ModelSpec
from mpillm.parallel.precision import torch_dtype
from mpillm.system.console import Console, binary_bytes
from mpillm.train.recipe import Recipe
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.open_source import open_source

if TYPE_CHECKING:
    from mpi4py import MPI

REFERENCE = "reference"
"""The fact of a checkpoint that names the reference: `path` and `digest`."""


def open_reference(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    device: torch.device,
    comm: "MPI.Intracomm",
    console: Console,
) -> tuple[PartModule, dict[str, Any]]:
    """Build the model of `train.start_from`, frozen; return it with the fact that names it.

    Every rank calls it. Raises MismatchError where a run continues and another model is there.
    """
    path = Path(recipe.train.start_from)
    source = open_source(path, comm, console)
    found = open_model(source, comm, console)
    fact = describe_base(source.path, found, comm)
    known = checkpoint.facts.get(REFERENCE) if checkpoint else None
    if isinstance(known, dict) and known.get("digest") != fact["digest"]:
        raise MismatchError(
            f"train.start_from: {path} is another model than the reference that "
            f"{checkpoint.folder if checkpoint else ''} was trained with: its weights have another "
            "digest; name that one, or set task.kl = 0"
        )
    held, dtype = found.with_context(recipe.model), torch_dtype(recipe.train.dtype)
    model = on_all(comm, lambda: _filled(recipe.model, held, device, dtype))
    nbytes = sum(weight.nbytes for weight in model.parameters())
    console.say(
        f"the reference: a copy of {source.path} in {binary_bytes(nbytes)} a rank; task.kl = 0 "
        "needs none"
    )
    return model, fact


@torch.no_grad()
def _filled(
    spec: ModelSpec, source: ModelSource, device: torch.device, dtype: torch.dtype
) -> PartModule:
    model = build_without_values(spec, device)
    for name, weight in model.named_weights():
        weight.copy_(source.read(name))
    return model.to(dtype).requires_grad_(False).eval()
