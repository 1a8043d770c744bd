"""The teacher of a distillation on a rank: forward passes of weights that are once a host."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpillm.comm.mesh import Mesh
from mpillm.errors import RecipeError
from mpillm.models.adapt import projection_of
from mpillm.models.linear_head import Outputs
from mpillm.models.part_module import Fields, PartModule, build_without_values
from mpillm.parallel.data.frozen_weights import FrozenWeights
from mpillm.parallel.devices import own_device
from mpillm.parallel.precision import torch_dtype
from mpillm.parallel.step_plan import StepPlan
from mpillm.tasks.distillation.hidden_term import LayerPair, hidden_term_sum
from mpillm.tasks.distillation.teacher_rows import TeacherRows
from mpillm.tasks.task import Task, outputs_read

if TYPE_CHECKING:
    from mpillm.parallel.pipeline.stage import ModelStage

# Fields of training alone: a teacher drops nothing.
OF_TRAINING = ("dropout_keys",)


class Teacher:
    """A whole frozen model on the ranks that compute the loss, and the loss that it takes part in.

    Every rank of the mesh makes it. Its weights have no values until `frozen` is filled.
    """

    def __init__(
        self, plan: StepPlan, mesh: Mesh, ends: PartModule | None, warn: Callable[[str], None]
    ) -> None:
        """`ends`: the part of the student that ends the model; None: another rank has it.

        Raises RecipeError on every rank where an architecture does not give the outputs of its
        layers.
        """
        assert plan.teacher is not None
        self._plan, device = plan.teacher, own_device(plan.precision.device)
        model = None if ends is None else build_without_values(self._plan.spec, device)
        self._model = model
        if model is not None and ends is not None:
            model.requires_grad_(False).eval()
        own = [part for part in (ends, model) if part is not None]
        _refuse([part for part in own if not part.keeps_outputs and self._plan.pairs], mesh)
        for place, part in enumerate(own):
            part.kept = dict.fromkeys(pair[place] for pair in self._plan.pairs)
        dtype = torch_dtype(self._plan.dtype(plan.precision.dtype))
        parts = [] if model is None else [model]
        self.frozen = FrozenWeights(parts, mesh, dtype, device, warn, alike=True)

    def objective_sum(
        self, task: Task, part: PartModule, outputs: Outputs, fields: Fields
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss of a microbatch, and its parts before their factors, (k,).

        `outputs`: the student's, of which `part` has just computed the last ones.
        """
        model, settings = self._model, self._plan.settings
        assert model is not None
        given = {name: field for name, field in fields.items() if name not in OF_TRAINING}
        with torch.no_grad():
            made = outputs_read(task, model.forward_part(given, ()).outputs)
        rows = TeacherRows(made[0], settings.temperature, settings.top_k)
        found = task.mixed_sum(outputs, fields, rows, settings.alpha, settings.temperature)
        if not self._plan.pairs:
            return found.loss, found.parts
        pairs = [
            LayerPair(_taken(part, own), _taken(model, theirs), projection_of(part, own))
            for own, theirs in self._plan.pairs
        ]
        hidden = hidden_term_sum(pairs, fields.get("counts"), settings.hidden)
        parts = torch.cat([found.parts, hidden.detach().view(1)])
        return found.loss + settings.hidden_weight * hidden, parts

    def close(self) -> None:
        """Free the communicator. Every rank calls it."""
        self.frozen.close()


def teach(
    stages: Iterable["ModelStage"], plan: StepPlan, mesh: Mesh, warn: Callable[[str], None]
) -> Teacher:
    """Make the teacher of a plan for a rank's stages. Every rank of the mesh calls it."""
    ends = next((stage for stage in stages if stage.part.ends), None)
    teacher = Teacher(plan, mesh, ends.part if ends else None, warn)
    if ends is not None:
        ends.teacher = teacher
    return teacher


def _refuse(parts: Iterable[PartModule], mesh: Mesh) -> None:
    """Raise RecipeError on every rank for the first of `parts`, whose outputs cannot be kept."""
    own = [part.spec.architecture for part in parts]
    if found := [name for names in mesh.comm.allgather(own) for name in names]:
        raise RecipeError(
            f"distillation.hidden compares outputs of layers, which the architecture {found[0]} "
            'does not give; set hidden = "none"'
        )


def _taken(part: PartModule, block: int) -> Tensor:
    """Take the kept output of a block: it lives as long as the graph of its microbatch."""
    output = part.kept[block]
    assert output is not None, "a pass keeps the outputs of its blocks"
    part.kept[block] = None
    return output
