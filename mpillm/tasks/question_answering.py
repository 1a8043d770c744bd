"""The answer to a question as a span of its context (Rajpurkar et al. 2016)."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mpillm.models.linear_head import Outputs, plain_outputs
from mpillm.models.spec import OutputKind
from mpillm.tasks.cross_entropy import cross_entropy_sum
from mpillm.tasks.metrics.metric import Array, Arrays
from mpillm.tasks.task import Fields, RawArrays, Task

# The longest answer, in tokens, as the field's scripts have it.
MOST_ANSWER_TOKENS = 30


class QuestionAnswering(Task):
    """The first and the last token of an answer. Fields: `ids`, `token_types` and `in_context`,
    each (B, T), `lengths` (B,) and `targets` (B, 2).

    The model's output has the shape (B, 2, T): of each position as the first, and as the last. The
    loss is the mean of both cross-entropies over the positions without padding. A row without the
    answer has position 0 as its target.
    """

    name: ClassVar[str] = "question-answering"
    answer_metrics: ClassVar[tuple[str, ...]] = ("exact-match", "squad-f1")
    output_kind: ClassVar[OutputKind] = "the ends of a span"
    field_names: ClassVar[tuple[str, ...]] = (
        "ids", "lengths", "token_types", "in_context", "targets",
    )  # fmt: skip
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    pair_kinds: ClassVar[tuple[str, ...]] = ("question-answering",)

    def fields(self, raw: RawArrays) -> dict[str, Tensor]:
        names = {
            "ids": "source",
            "lengths": "source_lengths",
            "token_types": "kinds",
            "in_context": "in_context",
            "targets": "span",
        }
        return {name: torch.from_numpy(raw[given]) for name, given in names.items()}

    def loss_sum(self, outputs: Outputs, fields: Fields) -> Tensor:
        return cross_entropy_sum(_unpadded(outputs, fields), fields["targets"])

    def weight(self, fields: Fields) -> float:
        return float(fields["targets"].numel())

    def fixed_weight(self, rows: int, context: int) -> float:
        return 2.0 * rows


def _unpadded(outputs: Outputs, fields: Fields) -> Tensor:
    """Return the logits (B, 2, T), those of padding -inf: it has no part in the softmax."""
    logits_B2T = plain_outputs(outputs)[0]
    places_T = torch.arange(logits_B2T.shape[2], device=logits_B2T.device)
    padding_BT = places_T >= fields["lengths"].to(logits_B2T.device)[:, None]
    return logits_B2T.masked_fill(padding_BT[:, None], -torch.inf)


def best_spans(outputs: Sequence[Array], fields: Arrays) -> Array:
    """Find the best span of each row, (B, 4): its score, its first and last position in the
    context, and the score of no answer.

    The score is the sum of the two logits, over spans of the context of up to 30 tokens. It is
    -inf where a row has none of the context.
    """
    starts_BT, ends_BT = (outputs[0][:, end].astype(np.float64) for end in (0, 1))
    null_B = starts_BT[:, 0] + ends_BT[:, 0]
    inside_BT = fields["in_context"].astype(bool)
    starts_BT = np.where(inside_BT, starts_BT, -np.inf)
    ends_BT = np.where(inside_BT, ends_BT, -np.inf)
    rows, length = np.arange(len(starts_BT)), starts_BT.shape[1]
    best_B = np.full(len(rows), -np.inf)
    first_B, last_B = np.zeros(len(rows)), np.zeros(len(rows))
    for more in range(min(MOST_ANSWER_TOKENS, length)):
        sums_BT = starts_BT[:, : length - more] + ends_BT[:, more:]
        place_B = sums_BT.argmax(1)
        better_B = sums_BT[rows, place_B] > best_B
        best_B[better_B] = sums_BT[rows, place_B][better_B]
        first_B[better_B], last_B[better_B] = place_B[better_B], place_B[better_B] + more
    return np.stack([best_B, first_B, last_B, null_B], 1)
