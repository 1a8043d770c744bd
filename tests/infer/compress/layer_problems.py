"""A layer with inputs as those of language models: a few features are large, and they correlate."""

import torch

from mpillm.infer.compress.input_statistics import InputStatistics


def problem(outputs: int = 24, inputs: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight (O, I) and inputs (N, I)."""
    chance = torch.Generator().manual_seed(3)
    mixed_II = torch.randn(inputs, inputs, generator=chance) / inputs**0.5
    x_NI = torch.randn(400, inputs, generator=chance) @ (mixed_II + torch.eye(inputs))
    x_NI[:, ::16] *= 20
    return torch.randn(outputs, inputs, generator=chance), x_NI


def statistics(x_NI: torch.Tensor, products: bool = True) -> InputStatistics:
    found = InputStatistics.empty(x_NI.shape[1], products)
    # In two batches.
    for part in x_NI.split(250):
        found.add(part)
    return found


def output_error(found_OI: torch.Tensor, weight_OI: torch.Tensor, x_NI: torch.Tensor) -> float:
    """Return the squared error of the outputs."""
    return float(((found_OI - weight_OI) @ x_NI.t()).square().sum())
