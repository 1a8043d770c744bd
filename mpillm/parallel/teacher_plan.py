"""The plan of a teacher in a step: its model, and which layers are compared; without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from mpillm.errors import LayoutError, MismatchError, RecipeError
from mpillm.models.spec import ModelSpec, Part
from mpillm.models.tuning import Projection
from mpillm.tasks.distillation.distillation_settings import LAST, DistillationSettings


@dataclass(frozen=True)
class TeacherPlan:
    """A frozen model that is whole on each rank that computes the loss."""

    spec: ModelSpec
    settings: DistillationSettings
    pairs: tuple[tuple[int, int], ...] = ()
    """The blocks that are compared, of student and teacher."""
    projections: tuple[Projection, ...] = ()
    """From outputs of the student, where the teacher's are of another width."""

    @classmethod
    def of(cls, settings: DistillationSettings, student: ModelSpec, teacher: ModelSpec) -> Self:
        """Number the layers. Raises RecipeError for layers that a model has not."""
        pairs = tuple(
            (_block(own, student, "model"), _block(theirs, teacher, "teacher"))
            for own, theirs in settings.layer_pairs
        )
        if len({own for own, _ in pairs}) < len(pairs):
            raise RecipeError(
                f"distillation.layers = {[list(pair) for pair in settings.layers]} names a layer "
                "of the model twice; give each one layer of the teacher"
            )
        inputs, outputs = student.stream_widths[-1], teacher.stream_widths[-1]
        made = tuple(Projection(own, inputs, outputs) for own, _ in pairs if inputs != outputs)
        return cls(teacher, settings, pairs, made)

    def check_fit(self, student: ModelSpec, path: str) -> None:
        """Raise MismatchError unless the teacher reads the student's batches and gives what it
        learns. `path`: of the teacher.
        """
        teacher, named = self.spec, f"distillation.teacher: {path}"
        if teacher.output_kind != student.output_kind:
            raise MismatchError(
                f"{named} gives {teacher.output_kind}, and the model gives {student.output_kind}; "
                "take a teacher that was trained for the same task"
            )
        for name in ("vocab_size", "classes"):
            ours, theirs = getattr(student, name, 0), getattr(teacher, name, 0)
            if ours != theirs:
                raise MismatchError(
                    f"{named} has {name} = {theirs:,}, and the model {ours:,}: their distributions "
                    f"are over other tokens or classes; set model.{name} = {theirs}, or take "
                    "another teacher"
                )
        for name in ("context", "source_context"):
            ours, theirs = getattr(student, name), getattr(teacher, name)
            if theirs < ours:
                raise MismatchError(
                    f"{named} reads {name} = {theirs:,} positions, and the model's rows have "
                    f"{ours:,}; set model.{name} = {theirs}, or take another teacher"
                )
        ours, theirs = ((each.input_field, each.input_item) for each in (student, teacher))
        if ours != theirs:
            raise MismatchError(
                f"{named} reads {theirs[0] or 'any field'} {theirs[1]}, and the model "
                f"{ours[0] or 'any field'} {ours[1]}; take a teacher of the same inputs"
            )

    def check_layout(self, parts: Sequence[Part], sizes: Mapping[str, int]) -> None:
        """Raise LayoutError for a layout whose ranks cannot compute the loss with the teacher.

        `parts`: of the student, a stage each; `sizes`: of the mesh.
        """
        if (context := sizes.get("context", 1)) > 1:
            raise LayoutError(
                f"distillation.teacher computes whole sequences, and parallel.context = {context} "
                "shares their positions among ranks; leave parallel.context out, and share the "
                "work by parallel.data, pipeline or tensor"
            )
        if not self.pairs:
            return
        if (tensor := sizes.get("tensor", 1)) > 1:
            raise LayoutError(
                "distillation.hidden compares whole outputs of layers, and parallel.tensor = "
                f"{tensor} cuts them; leave parallel.tensor out, or set distillation.hidden = none"
            )
        last = max(parts, key=lambda part: part.last)
        if early := [own for own, _ in self.pairs if own < last.first]:
            raise LayoutError(
                "distillation.layers are compared where the loss is computed, by the last stage of "
                f"the pipeline with the layers {last.first} to {last.last - 1}, and {early} are in "
                "others; compare those of the last stage, or leave parallel.pipeline out"
            )

    def dtype(self, run: str) -> str:
        """Return the dtype of its weights in a run of the dtype `run`."""
        return run if self.settings.dtype == "run" else self.settings.dtype


def _block(number: int, spec: ModelSpec, whose: str) -> int:
    if number == LAST:
        return spec.blocks - 1
    if number >= spec.blocks:
        raise RecipeError(
            f"distillation.layers names layer {number:,} of the {whose}, whose layers are numbered "
            f"from 0 to {spec.blocks - 1:,}; name one of them"
        )
    # Of two stacks, the stream of the decoder passes next to the outputs of the encoder.
    if spec.source_field and len(spec.streams_ahead(min(number + 1, spec.blocks - 1))) == 1:
        raise RecipeError(
            f"distillation.layers names layer {number:,} of the {whose}, which reads the source, "
            "and the targets are those of the decoder; name layers of the decoder, which follow "
            "those of the encoder"
        )
    return number
