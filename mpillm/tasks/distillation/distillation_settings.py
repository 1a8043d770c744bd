"""The section [distillation] of a recipe: the teacher, and what a student learns of it.

Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network". Imports no torch.
"""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from mpillm.errors import RecipeError

LAST = -1
"""The number of a model's last layer in `layer_pairs`."""
PARTS = ("task_loss", "distillation_kl")
"""The parts of the loss that a step records, each before its factor."""
HIDDEN_PART = "distillation_hidden"


@dataclass(frozen=True)
class DistillationSettings:
    """A frozen teacher of the same tokenizer. The loss is (1 − alpha) · task loss + alpha · T² ·
    KL(teacher ‖ student), with both distributions at the temperature T.
    """

    teacher: str = ""
    """A run, a checkpoint or a Hugging Face folder; empty: there is none."""
    alpha: Annotated[float, Ge(0), Le(1)] = 0.5
    """The share of the divergence from the teacher in the loss."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """What divides the logits of both."""
    top_k: Annotated[int, Ge(0)] = 0
    """Learn the teacher's distribution over its so many largest logits alone; 0: over all."""
    hidden: Literal["none", "mse", "cosine"] = "none"
    """Compare outputs of layers, too: by the mean squared difference, or by 1 − cosine."""
    hidden_weight: Annotated[float, Gt(0)] = 1.0
    """The factor of that term in the loss."""
    layers: tuple[tuple[Annotated[int, Ge(0)], Annotated[int, Ge(0)]], ...] = ()
    """Pairs of a layer of the student and one of the teacher, as names of weights number them;
    empty: the last ones. A projection is learnt where the widths differ.
    """
    dtype: Literal["run", "float32", "bfloat16"] = "run"
    """Of the teacher's weights and activations. run: train.dtype."""

    def __post_init__(self) -> None:
        if not self.teacher:
            others = [
                each.name for each in fields(self) if getattr(self, each.name) != each.default
            ]
            if others:
                raise RecipeError(
                    f"{', '.join(others)} belong to a teacher, and teacher names none; name a run, "
                    "a checkpoint or a Hugging Face folder"
                )
            return
        if self.hidden == "none" and not self.alpha:
            raise RecipeError(
                "alpha = 0 leaves the teacher's distribution out, and hidden = none its layers: "
                "nothing is learnt of the teacher; set alpha from above 0 to 1, or leave teacher "
                "out"
            )
        if self.layers and self.hidden == "none":
            raise RecipeError(
                "layers names what is compared, and hidden = none compares nothing; set hidden to "
                "mse or cosine"
            )

    @property
    def layer_pairs(self) -> tuple[tuple[int, int], ...]:
        """The layers that are compared, of student and teacher; LAST is the last one."""
        if self.hidden == "none":
            return ()
        return self.layers or ((LAST, LAST),)

    @property
    def compared(self) -> str:
        """The layers that are compared, in words."""
        if self.hidden == "none":
            return "none"
        return str([list(pair) for pair in self.layers]) if self.layers else "the last"

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts of the loss; empty without a teacher."""
        if not self.teacher:
            return ()
        return (*PARTS, HIDDEN_PART) if self.layer_pairs else PARTS


NO_TEACHER = DistillationSettings()


def read_distillation(section: Any) -> DistillationSettings:
    """Read the section [distillation] of a checkpoint's recipe, which earlier releases lack."""
    if not isinstance(section, dict):
        return NO_TEACHER
    known = {each.name: section[each.name] for each in fields(NO_TEACHER) if each.name in section}
    layers = tuple(tuple(pair) for pair in known.pop("layers", ()))
    return replace(NO_TEACHER, **known, layers=layers)
