"""What equals a model of transformers: our outputs, gradients, weights and settings."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from mpillm.models.families.family import Family, Place
from mpillm.models.families.family_catalog import find_family
from mpillm.models.part_module import PartModule, create
from mpillm.models.spec import ModelSpec
from tests.pretrained import peer

Adopted = tuple[Family, ModelSpec, PartModule]
"""Our model of their settings, with their weights."""


def perturb(model: Any) -> Any:
    """Change all weights, norms and biases too, so that each of them counts; no constants."""
    with torch.no_grad():
        for weight in filter(lambda each: each.requires_grad, model.parameters()):
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
    tensor = tensor[0] if place.squeezed else tensor
    return tensor.T if place.transposed else tensor


def adopt(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Adopted:
    """Make our model of their settings, with their weights."""
    family = find_family(config)
    spec = family.spec(config)
    model, places = create(spec, 1), family.places(spec)
    assert set(places) == set(dict(model.named_weights()))
    with torch.no_grad():
        for name, weight in model.named_weights():
            weight.copy_(read(tensors, places[name]))
    return family, spec, model


def check_outputs(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Compare in float32: the sums are taken in other orders."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-4
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def check_gradients(
    ours: Adopted, gradients: dict[str, torch.Tensor], constants: tuple[str, ...] = ()
) -> None:
    """Compare all gradients. `constants`: weights of ours that are buffers of theirs."""
    family, spec, model = ours
    places = family.places(spec)
    for name, weight in model.named_weights():
        assert weight.grad is not None, name
        if name in constants:
            assert weight.grad.abs().max() > 0, name
            continue
        wanted = read(gradients, places[name])
        assert (weight.grad - wanted).abs().max() <= 1e-4, name
        assert (weight.grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-7, name


def check_state_dict(ours: Adopted, wanted: dict[str, torch.Tensor]) -> None:
    """Write our weights as their tensors, which are the same bit by bit."""
    family, spec, model = ours
    shapes, aliases = family.tensors(spec), family.aliases(spec)
    back = {key: torch.full(shape, torch.nan) for key, shape in shapes.items()}
    with torch.no_grad():
        for name, place in family.places(spec).items():
            read(back, place).copy_(model.get_parameter(name))
    assert set(wanted) == set(back) | set(aliases)
    assert all(torch.equal(wanted[key], tensor) for key, tensor in back.items())
    assert all(torch.equal(wanted[key], back[leader]) for key, leader in aliases.items())


def reloaded(ours: Adopted, theirs: Any) -> Any:
    """Check that settings go there and back; make their model again, of what we write."""
    transformers = peer("transformers")
    family, spec, _ = ours
    written = family.config(spec)
    assert family.spec(written) == spec
    config = transformers.AutoConfig.for_model(**written)
    # Short files leave out the defaults of their family.
    named = {key: written[key] for key in ("model_type", "architectures")}
    assert family.spec({**config.to_diff_dict(), **named}) == spec
    loaded = getattr(transformers, written["architectures"][0])(config).eval()
    assert type(loaded) is type(theirs)
    loaded.load_state_dict(theirs.state_dict())
    return loaded
