"""Group relative policy optimization (Shao et al. 2024, DeepSeekMath): answers that earn more."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from mpillm.models.linear_head import LinearHead, Outputs
from mpillm.tasks.chat import Chat
from mpillm.tasks.cross_entropy import cross_entropy_sum, position_losses
from mpillm.tasks.metrics.metric import Array
from mpillm.tasks.task import Fields
from mpillm.tasks.vocabulary import Lengths, Vocabulary

if TYPE_CHECKING:
    from mpillm.tasks.task_catalog import TaskSettings

# TRL adds as much to the deviation: a group with almost equal rewards has no huge advantages.
LEAST_DEVIATION = 1e-4


class Written(NamedTuple):
    """A prompt and the answer that the model wrote, as token ids."""

    prompt: list[int]
    answer: list[int]
    log_probs: list[float]
    """Of each token of the answer, when it was drawn."""


class GRPO(Chat):
    """Answers that the model writes, each with the advantage of its reward over its group's.

    Fields in training, each (B, T): those of `Chat`, where `counts` marks the answer; `advantages`
    (B, 1); `reference`, the reference's log-probability of each target, where `task.kl` is above 0;
    `drawn`, that of the policy which wrote it, where `task.updates` is above 1.

    With the ratio r = π / π_drawn, the advantage A and d = log π_ref − log π, a token's loss is
    −min(r · A, clip(r, 1 − ε, 1 + ε) · A) + kl · (e^d − d − 1), and that of an answer the mean over
    its tokens (equations 3 and 4). Without `drawn`, r is 1 and its slope that of log π.

    Without `advantages`, as in an evaluation, the loss is that of `Chat`: of the data's answers.
    """

    name: ClassVar[str] = "grpo"
    sums_positions: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    writes_answers: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: "TaskSettings") -> None:
        super().__init__()
        self.kl, self.clip, self.temperature = settings.kl, settings.clip, settings.temperature

    @classmethod
    def make(cls, settings: "TaskSettings", vocabulary: Vocabulary, lengths: Lengths) -> Self:
        return cls(settings)

    def fixed_weight(self, rows: int, context: int) -> float:
        return float(rows)

    def weight(self, fields: Fields) -> float:
        if "advantages" in fields:
            return float(len(fields["advantages"]))
        return super().weight(fields)

    def row_losses(self, outputs: Outputs, fields: Fields) -> Tensor:
        if "advantages" in fields:
            return self.losses(self.log_probs(outputs, fields), fields).sum(1)
        return position_losses(outputs[0], fields["targets"], fields["counts"]).sum(1)

    def loss_sum(self, outputs: Outputs, fields: Fields) -> Tensor:
        """Sum the losses. Logits are read in chunks, twice: for the log-probabilities, and then for
        the gradient, which is that of a cross-entropy whose targets have the loss's slopes as
        weights.
        """
        if "advantages" not in fields:
            return super().loss_sum(outputs, fields)
        logs_BT = self.log_probs(outputs, fields)
        if not torch.is_grad_enabled():
            return self.losses(logs_BT, fields).sum().float()
        logs_BT = logs_BT.requires_grad_()
        loss = self.losses(logs_BT, fields).sum()
        [slopes_BT] = torch.autograd.grad(loss, logs_BT)
        output = tempered(outputs[0], self.temperature)
        surrogate = cross_entropy_sum(output, fields["targets"], (-slopes_BT).float())
        # The value is the loss to its last bit, the gradient is the surrogate's.
        return loss.detach().to(surrogate.dtype) + (surrogate - surrogate.detach())

    def log_probs(self, outputs: Outputs, fields: Fields) -> Tensor:
        """Return log π of each target of an answer, float64 (B, T), without gradients; else 0.

        Of the policy that draws tokens: logits are divided by the temperature.
        """
        output = tempered(outputs[0], self.temperature)
        return -position_losses(output, fields["targets"], fields["counts"]).double()

    def losses(self, logs_BT: Tensor, fields: Fields) -> Tensor:
        """Return the share of each position in the loss of its row, (B, T)."""
        counts_BT, advantages_B1 = fields["counts"], fields["advantages"]
        drawn_BT = fields.get("drawn", logs_BT.detach())
        ratios_BT = (logs_BT - drawn_BT).exp()
        clipped_BT = ratios_BT.clamp(1 - self.clip, 1 + self.clip)
        losses_BT = -torch.minimum(ratios_BT * advantages_B1, clipped_BT * advantages_B1)
        if self.kl:
            losses_BT = losses_BT + self.kl * divergences(fields["reference"] - logs_BT)
        lengths_B1 = counts_BT.sum(1, keepdim=True).clamp(min=1)
        return torch.where(counts_BT, losses_BT, 0.0) / lengths_B1


def tempered(output: Tensor | LinearHead, temperature: float) -> Tensor | LinearHead:
    """Divide logits by the temperature; a head is left as one."""
    if temperature == 1:
        return output
    if not isinstance(output, LinearHead):
        return output / temperature
    bias_V = None if output.bias_V is None else output.bias_V / temperature
    # cap · tanh(logit / cap) / t is that of a cap and logits which are both divided.
    return output._replace(
        hidden_BTC=output.hidden_BTC / temperature,
        bias_V=bias_V,
        soft_cap=output.soft_cap / temperature,
    )


def divergences(ratios: Tensor) -> Tensor:
    """Estimate KL(π ‖ π_ref) from log π_ref − log π of drawn tokens: e^d − d − 1, never below 0."""
    # expm1: d is tiny at first, and its square would be lost next to 1.
    return ratios.expm1() - ratios


def advantages_of(rewards_N: Array, group: int) -> Array:
    """Normalise the rewards of each group of answers to one prompt: (r − mean) / deviation.

    The deviation is that of a sample (n − 1). Where all rewards are alike, advantages are 0.
    """
    rewards_PG = rewards_N.reshape(-1, group)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdims=True)
    deviation_P1 = rewards_PG.std(1, ddof=1, keepdims=True)
    # Rounding alone may leave a deviation of 1e-17.
    scaled_PG = np.where(alike(rewards_PG)[:, None], 0.0, centred_PG)
    found: Array = (scaled_PG / (deviation_P1 + LEAST_DEVIATION)).reshape(-1)
    return found


def alike(rewards_PG: Array) -> Array:
    """Return of which groups all rewards are the same, (P,)."""
    found: Array = (rewards_PG == rewards_PG[:, :1]).all(1)
    return found


def answer_fields(written: Sequence[Written], padding: int) -> dict[str, Tensor]:
    """Make the fields of rows that the model wrote, as long as the longest of them, without
    advantages.
    """
    longest = max(len(each.prompt) + len(each.answer) for each in written)
    tokens_BT = torch.full((len(written), longest), padding, dtype=torch.int64)
    counts_BT = torch.zeros((len(written), longest), dtype=torch.bool)
    drawn_BT = torch.zeros((len(written), longest), dtype=torch.float64)
    for row, (prompt, answer, log_probs) in enumerate(written):
        own = slice(len(prompt), len(prompt) + len(answer))
        tokens_BT[row, : own.stop] = torch.tensor([*prompt, *answer])
        counts_BT[row, own] = True
        drawn_BT[row, own] = torch.tensor(log_probs, dtype=torch.float64)
    return {
        "ids": tokens_BT[:, :-1],
        "targets": tokens_BT[:, 1:],
        "counts": counts_BT[:, 1:],
        "drawn": drawn_BT[:, 1:],
    }
