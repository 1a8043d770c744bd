"""The base of all tasks: fields of a batch, targets, loss, and metrics of an evaluation.

Nothing outside `tasks` cuts targets out of tokens or computes a loss. A task is one file.

Shapes: B sequences, T positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from mpillm.models.linear_head import LinearHead, Outputs, plain_outputs
from mpillm.models.spec import OutputKind
from mpillm.tasks.vocabulary import Lengths, Vocabulary

if TYPE_CHECKING:
    from mpillm.tasks.distillation.chunked_distillation import MixedLoss
    from mpillm.tasks.distillation.teacher_rows import TeacherRows
    from mpillm.tasks.task_catalog import TaskSettings

RawArrays = Mapping[str, np.ndarray[Any, np.dtype[Any]]]
Fields = Mapping[str, Tensor]


class Task(ABC):
    """A task. A run has one object of it, which holds no state."""

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "bits-per-byte")
    """Metrics of an evaluation, by their names in the metric catalogue, in order."""

    text_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics of the text that a model writes for a pair (`evaluate --generate`), by name; none:
    it writes no text, or the pairs have no reference.
    """

    answer_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics of the texts of spans that are answers, by name, which evaluations add."""

    field_names: ClassVar[tuple[str, ...]]
    """The fields of every batch; `documents` is added where the recipe asks for it."""

    pair_kinds: ClassVar[tuple[str, ...]] = ()
    """The kinds of pairs (`prepare --task`) that it learns from; none: it reads tokens."""

    classes: tuple[str, ...] = ()
    """The names of the data's classes, in the order of their numbers; set by `make_task`."""

    problem_type: ClassVar[str] = ""
    """What transformers calls the problem of a head of classes; "": nothing."""

    output_kind: ClassVar[OutputKind] = "any"
    """What it learns: a model that gives something else is refused."""

    reads_heads: ClassVar[bool] = False
    """Whether the losses take a `LinearHead` in place of its logits, so that these need not exist.

    Logits come where the architecture returns no head, or a metric needs them.
    """

    terms: ClassVar[tuple[str, ...]] = ()
    """The settings that change its loss in training, which other tasks refuse."""

    needs_reference: ClassVar[bool] = False
    """Whether its data comes with what the weights at the start say of it (`reference`)."""

    needs_baseline: ClassVar[bool] = False
    """Whether training needs the field `baseline` (B, 1), as KTO does: see `reference_point`."""

    writes_answers: ClassVar[bool] = False
    """Whether training learns from answers that the model writes, by their rewards: see `rollouts`
    in `train`.
    """

    metric_kind: ClassVar[str] = ""
    """What metrics read, where it is not what the model gives (`output_kind`)."""

    metrics_read_logits: ClassVar[bool] = True
    """Whether metrics read the outputs, heads as their logits; else those of `metric_outputs`."""

    sums_positions: ClassVar[bool] = False
    """Whether the losses are sums over positions, each of its own output and fields (B, T).

    Ranks can then share the positions of a sequence.
    """

    packs: ClassVar[bool] = False
    """Whether several of its samples may share a row (`data.pack`), kept apart by `documents`."""

    @classmethod
    def make(cls, settings: "TaskSettings", vocabulary: Vocabulary, lengths: Lengths) -> Self:
        """Make the task of a run; a task without settings of its own ignores them.

        Raises RecipeError for settings that the data or the lengths do not allow.
        """
        return cls()

    def model_settings(self, vocabulary: Vocabulary) -> dict[str, int]:
        """Return the settings of the model that follow from the data, where they are 0."""
        return {"vocab_size": vocabulary.size}

    def row_tokens(self, lengths: Lengths) -> int:
        """Return how many tokens of a dataset make a full row."""
        return lengths.context + 1

    def positions(self, tokens: int) -> int:
        """Return the positions of the model in a row of `tokens` tokens, in an evaluation.

        By default all of a pair; of a text all but one, whose token is the last target.
        """
        return tokens if self.pair_kinds else tokens - 1

    @abstractmethod
    def fields(self, raw: RawArrays) -> dict[str, Tensor]:
        """Make a batch's fields from `raw`, the arrays of the sampler.

        `raw` holds `tokens` (B, `row_tokens`). Where the recipe asks for a document mask it also
        holds `documents` of this shape, each position's document number within its row. `keys`
        (B,), int64: a random number of each row, for random choices. The arrays of pairs are those
        of `tokens/pairs`. The first dim of each field counts sequences.
        """

    @abstractmethod
    def loss_sum(self, outputs: tuple[Tensor, ...], fields: Fields) -> Tensor:
        """Return the loss summed over the targets of `fields`, in nats: a float32 scalar.

        The sum, not the mean: microbatches and ranks may have unequal numbers of targets.
        """

    def objective_sum(self, outputs: tuple[Tensor, ...], fields: Fields) -> Tensor:
        """Return what training minimises, summed as in `loss_sum`: that loss, unless overridden."""
        return self.loss_sum(outputs, fields)

    @abstractmethod
    def weight(self, fields: Fields) -> float:
        """Count the targets of `fields`: the mean loss is the sum of losses over this number."""

    @property
    def distils(self) -> bool:
        """Whether `mixed_sum` mixes its loss with the divergence from a teacher."""
        return False

    def mixed_sum(
        self,
        outputs: Outputs,
        fields: Fields,
        teacher: "TeacherRows",
        alpha: float,
        temperature: float,
    ) -> "MixedLoss":
        """Sum (1 − alpha) · `objective_sum` + alpha · T² · KL(teacher ‖ student), and both parts.

        A position has the weight of its target.
        """
        raise NotImplementedError(f"the task {self.name} learns from no teacher")

    def row_losses(self, outputs: Outputs, fields: Fields) -> Tensor:
        """Return the loss of each row, (B,), as `loss_sum` computes it of that row alone.

        Override it where rows need each other, or a faster way is at hand.
        """
        rows = row_count(outputs)
        losses = [
            self.loss_sum(_row_of_outputs(outputs, row), _row_of_fields(fields, row))
            for row in range(rows)
        ]
        return torch.stack(losses)

    def metric_outputs(self, outputs: Outputs, fields: Fields) -> tuple[Any, ...]:
        """Return what metrics read of a batch, the first dim of each counting rows."""
        return outputs

    def row_weights(self, fields: Fields, rows: int) -> list[float]:
        """Return the weight of each of the `rows` rows."""
        return [self.weight(_row_of_fields(fields, row)) for row in range(rows)]

    def fixed_weight(self, rows: int, context: int) -> float | None:
        """Return the weight of any `rows` full sequences, where their shape determines it.

        None: it depends on the data; the ranks then add up the weights of each batch, by one
        message before its passes.
        """
        return None


def outputs_read(task: Task, made: Outputs) -> tuple[Any, ...]:
    """Return the outputs of a model as the task reads them: heads, or their logits."""
    return made if task.reads_heads else plain_outputs(made)


def row_count(outputs: Outputs) -> int:
    """Return the rows of a batch that a model gave `outputs` for."""
    first = outputs[0]
    return len(first.hidden_BTC if isinstance(first, LinearHead) else first)


def _row_of_outputs(outputs: Outputs, row: int) -> tuple[Any, ...]:
    """Return the outputs of one row, as a batch of one."""
    own = slice(row, row + 1)
    return tuple(
        each._replace(hidden_BTC=each.hidden_BTC[own])
        if isinstance(each, LinearHead)
        else each[own]
        for each in outputs
    )


def _row_of_fields(fields: Fields, row: int) -> dict[str, Tensor]:
    return {name: field[row : row + 1] for name, field in fields.items()}
