"""A mixture of experts: a router sends each position to a few feed-forwards (Shazeer et al. 2017).

Shapes: B sequences, T positions, C width, E experts; N positions (B · T), K experts of a position,
M pairs of both (N · K).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mpillm.models.block_settings import BlockSettings
from mpillm.models.layers.feed_forward import FeedForward

RunExperts = Callable[["Mixture", Tensor, list[int]], Tensor]
"""Computes the outputs (M, C) of inputs (M, C) that are sorted by expert, so many for each."""


class Mixture(nn.Module):
    """Experts, their router, and a shared expert that all positions pass.

    All experts compute, also those without a position: each weight gets a gradient in each step.
    `run_experts` takes the place of `compute` where some of `experts` have been taken out.
    """

    def __init__(self, config: BlockSettings) -> None:
        super().__init__()
        self.chosen, self.of_chosen = config.experts_per_token, config.expert_softmax == "chosen"
        self.balances = config.balance_loss > 0
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.experts = nn.ModuleDict({str(n): FeedForward(config) for n in range(config.experts)})
        self.run_experts: RunExperts = Mixture.compute
        shared, gated = config.shared_hidden, config.shared_gate
        self.shared = FeedForward(config, shared) if shared else None
        self.shared_factor = nn.Linear(config.width, 1, bias=False) if gated else None

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the outputs and, where gradients are wanted, the loss of the choices."""
        x_NC = x_BTC.flatten(0, 1)
        # float32: near shares, rounded, would choose other experts than the published model.
        share_NE = self.router(x_NC).float().softmax(-1)
        share_NK, expert_NK = self._choose(share_NE, x_NC.dtype)
        expert_M = expert_NK.flatten()
        order_M = expert_M.argsort(stable=True)
        # Copied before it is sorted: a position's K gradients are then summed in one order.
        x_MC = x_NC[:, None].expand(-1, self.chosen, -1).reshape(-1, x_NC.shape[-1])
        counts = torch.bincount(expert_M, minlength=share_NE.shape[-1]).tolist()
        y_MC = self.run_experts(self, x_MC.index_select(0, order_M), counts)
        y_MC = y_MC.index_select(0, order_M.argsort()) * share_NK.flatten()[:, None]
        y_NC = y_MC.view(len(x_NC), self.chosen, -1).sum(1)
        if self.shared is not None:
            own_NC = self.shared(x_NC)
            factor_N1 = None if self.shared_factor is None else self.shared_factor(x_NC).sigmoid()
            y_NC = y_NC + (own_NC if factor_N1 is None else factor_N1 * own_NC)
        loss = None
        if self.balances and torch.is_grad_enabled():
            loss = balance(share_NE.unflatten(0, x_BTC.shape[:2]), expert_NK)
        return y_NC.view(x_BTC.shape), loss

    def compute(self, x_MC: Tensor, counts: list[int]) -> Tensor:
        """Compute the experts that are here, each with its part of the inputs, in their order."""
        pieces = torch.split(x_MC, counts)
        experts = self.experts.values()
        return torch.cat([each(x) for each, x in zip(experts, pieces, strict=True)])

    def _choose(self, share_NE: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the shares of the chosen experts of each position, and their numbers: (N, K)."""
        share_NK, expert_NK = share_NE.topk(self.chosen)
        if self.of_chosen:
            share_NK = share_NK / share_NK.sum(-1, keepdim=True)
        return share_NK.to(dtype), expert_NK


def balance(share_BTE: Tensor, expert_NK: Tensor) -> Tensor:
    """Return the loss that is lowest where a sequence's choices are spread evenly, summed over B.

    Of a sequence: Σ f_i P_i over the experts, 1 where all are alike. f_i: the share of its choices
    that fell on expert i, times E, without a gradient. P_i: the mean of the router's shares.
    Sources: Fedus et al. 2021, "Switch Transformers", eq. 4 to 6; a sequence at a time as DeepSeek-
    AI 2024, "DeepSeek-V3 Technical Report", eq. 17 to 20, so that batches may be cut anywhere.
    """
    rows, _, experts = share_BTE.shape
    expert_BM = expert_NK.view(rows, -1)
    counts_BE = torch.zeros(rows, experts, device=expert_NK.device)
    counts_BE.scatter_add_(1, expert_BM, torch.ones_like(expert_BM, dtype=counts_BE.dtype))
    f_BE = counts_BE * (experts / expert_BM.shape[1])
    return (f_BE * share_BTE.mean(1)).sum()
