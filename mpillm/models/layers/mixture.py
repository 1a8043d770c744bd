"""A mixture of experts: a router sends each position to a few feed-forwards (Shazeer et al. 2017).

Shapes: B sequences, T positions, C width, E experts; N positions (B · T), K experts of a position,
M pairs of both (N · K).
"""

import torch
from torch import Tensor, nn

from mpillm.models.block_settings import BlockSettings
from mpillm.models.layers.feed_forward import FeedForward


class Mixture(nn.Module):
    """Experts, their router, and a shared expert that all positions pass.

    All experts compute, also those without a position: each weight gets a gradient in each step.
    """

    def __init__(self, config: BlockSettings) -> None:
        super().__init__()
        self.chosen, self.of_chosen = config.experts_per_token, config.expert_softmax == "chosen"
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.experts))
        shared, gated = config.shared_hidden, config.shared_gate
        self.shared = FeedForward(config, shared) if shared else None
        self.shared_factor = nn.Linear(config.width, 1, bias=False) if gated else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_NC = x_BTC.flatten(0, 1)
        share_NK, expert_NK = self._route(x_NC)
        expert_M = expert_NK.flatten()
        order_M = expert_M.argsort(stable=True)
        # Copied before it is sorted: a position's K gradients are then summed in one order.
        x_MC = x_NC[:, None].expand(-1, self.chosen, -1).reshape(-1, x_NC.shape[-1])
        counts = torch.bincount(expert_M, minlength=len(self.experts)).tolist()
        pieces = torch.split(x_MC.index_select(0, order_M), counts)
        y_MC = torch.cat([each(x) for each, x in zip(self.experts, pieces, strict=True)])
        y_MC = y_MC.index_select(0, order_M.argsort()) * share_NK.flatten()[:, None]
        y_NC = y_MC.view(len(x_NC), self.chosen, -1).sum(1)
        if self.shared is not None:
            own_NC = self.shared(x_NC)
            factor_N1 = None if self.shared_factor is None else self.shared_factor(x_NC).sigmoid()
            y_NC = y_NC + (own_NC if factor_N1 is None else factor_N1 * own_NC)
        return y_NC.view(x_BTC.shape)

    def _route(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of the chosen experts of each position, and their numbers: (N, K)."""
        # float32: near shares, rounded, would choose other experts than the published model.
        share_NK, expert_NK = self.router(x_NC).float().softmax(-1).topk(self.chosen)
        if self.of_chosen:
            share_NK = share_NK / share_NK.sum(-1, keepdim=True)
        return share_NK.to(x_NC.dtype), expert_NK
