"""Tensors of transformers' models as their files have them, and ours among them."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from mpillm.models.families.family import Place


def perturb(model: Any) -> Any:
    """Change all weights, norms and biases too, so that each of them counts."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2 if weight.dim() == 1 else 0.05)
    return model


def stored(model: Any, gradients: bool = False, converts: bool = False) -> dict[str, torch.Tensor]:
    """Return the tensors of a model, or their gradients, as its files have them.

    `converts`: in memory they have other names, or the experts of a layer are one tensor.
    """
    from safetensors.torch import load_file

    tensors = {
        name: weight.grad if gradients else weight for name, weight in model.named_parameters()
    }
    if not converts:
        return tensors if gradients else model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=tensors)
        return load_file(Path(folder) / "model.safetensors")


def read(tensors: dict[str, torch.Tensor], place: Place) -> torch.Tensor:
    """Read one of our weights from their tensors."""
    tensor = tensors[place.name]
    if place.box is not None:
        for dim, (start, size) in enumerate(zip(*place.box, strict=True)):
            tensor = tensor.narrow(dim, start, size)
    return tensor.T if place.transposed else tensor
