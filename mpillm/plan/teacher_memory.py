"""Predict the memory of a teacher on a rank: without torch and MPI."""

from dataclasses import dataclass

from mpillm.models.spec import ModelSpec
from mpillm.parallel.step_plan import ELEMENT_BYTES, StepPlan
from mpillm.plan.held_memory import FLOAT32_BYTES, Replicas

# Float32 numbers of a projection's element: weight, gradient, and Adam's two averages.
PROJECTION_NUMBERS = 4


@dataclass(frozen=True)
class TeacherBytes:
    """The bytes of a teacher."""

    held: int = 0
    """Weights, and projections to the teacher's width."""
    counted_elsewhere: int = 0
    """Of these, in shared pages that another rank of the node counts."""
    forward: int = 0
    """Of a forward pass, which ends before the loss."""
    loss: int = 0
    """Of its logits and outputs in the loss."""


def teacher_bytes(
    student: ModelSpec, plan: StepPlan, replicas: Replicas, ends: bool
) -> TeacherBytes:
    """Estimate what a rank holds of the plan's teacher; `ends`: whether it computes the loss."""
    teacher = plan.teacher
    if teacher is None or not ends:
        return TeacherBytes()
    spec, device, rows = teacher.spec, plan.precision.device, plan.microbatch
    element = ELEMENT_BYTES[teacher.dtype(plan.precision.dtype)]
    weights = element * spec.parameters
    # Ranks of other stages of a pipeline have none.
    sharing = max(1, replicas.neighbours // plan.schedule.ranks) if device == "cpu" else 1
    projected = sum(each.inputs * each.outputs for each in teacher.projections)
    # The outputs of layers that are compared, in float32 with their difference.
    compared = 2 * FLOAT32_BYTES * len(teacher.pairs) * max(spec.stream_widths)
    return TeacherBytes(
        weights + PROJECTION_NUMBERS * FLOAT32_BYTES * projected,
        weights * (sharing - 1) // sharing,
        spec.scoring_bytes(rows, element) * student.context // spec.context,
        spec.logits_bytes(rows, device) + rows * student.context * compared,
    )
