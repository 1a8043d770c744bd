import math

import pytest
import torch

from mpillm.errors import RecipeError
from mpillm.models.decoder import DecoderConfig
from mpillm.models.part_module import weight_shapes
from mpillm.models.spec import Part
from mpillm.train.optimizers.muon import MuonSettings, is_inner_matrix, orthogonalised
from tests.train.optimizers.paths import (
    adamw_reference,
    check_close,
    gradients,
    new_weights,
    optimized,
    rates,
    referred,
)


def near_one(values: torch.Tensor, steps: int) -> torch.Tensor:
    """Apply the quintic to singular values themselves."""
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


def polar(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton–Schulz by the singular value decomposition: slow, and exact."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left @ torch.diag(near_one(values / values.norm(), steps)) @ right


@pytest.mark.parametrize("nesterov", [False, True])
def test_it_is_the_papers(nesterov: bool) -> None:
    def update(name, weight, gradient, state, step, rate, decay):  # type: ignore[no-untyped-def]
        if not is_inner_matrix(name, tuple(weight.shape)):
            return adamw_reference(name, weight, gradient, state, step, rate, decay)
        momentum = state.setdefault("momentum", torch.zeros_like(weight))
        momentum.copy_(0.95 * momentum + gradient)
        direction = polar(gradient + 0.95 * momentum if nesterov else momentum)
        size = 0.2 * math.sqrt(max(weight.shape))
        weight -= rate * (size * direction + decay * weight)
        return None

    settings = MuonSettings(nesterov=nesterov, weight_decay=0.3)
    check_close(optimized(settings), referred(update, 0.3), rtol=1e-4)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9 on")
def test_it_is_torch_s_within_bfloat16() -> None:
    weights = {n: w for n, w in new_weights().items() if is_inner_matrix(n, tuple(w.shape))}
    plain = torch.optim.Muon(weights.values(), weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for rate, found in zip(rates(), gradients(), strict=True):
        for name, weight in weights.items():
            weight.grad = found[name].clone()
        plain.param_groups[0]["lr"] = rate
        plain.step()
    ours, begun = optimized(MuonSettings()), new_weights()
    for name, weight in weights.items():
        moved, theirs = ours[name] - begun[name].detach(), (weight - begun[name]).detach()
        assert float((moved - theirs).norm() / theirs.norm()) < 0.02, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (24, 24)])
def test_singular_values_come_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-6
    found = orthogonalised(matrix, 5, dtype)
    assert found.dtype == dtype
    assert found.shape == matrix.shape
    values = torch.linalg.svdvals(found.float())
    assert values.max() < 1.3
    assert (values > 0.6).float().mean() > 0.8
    assert not orthogonalised(torch.zeros(shape), 5, dtype).any()


def test_embeddings_head_and_vectors_are_adamw_s() -> None:
    spec = DecoderConfig(layers=2, width=16, heads=2, vocab_size=30, tied=False, bias=True)
    shapes = {name: shape for name, (_, shape) in weight_shapes(spec).items()}
    inner = {name for name, shape in shapes.items() if is_inner_matrix(name, shape)}
    assert inner == {
        f"layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in (
            *(f"attention.{kind}" for kind in ("query", "key", "value", "output")),
            *(f"feed_forward.{kind}" for kind in ("gate", "up", "down")),
        )
    }


def test_a_model_without_numbered_matrices_is_refused() -> None:
    weights = {"embedding.weight": torch.nn.Parameter(torch.ones(3, 2))}
    with pytest.raises(RecipeError, match=r"this model has none \(embedding\.weight, …\); take ad"):
        MuonSettings().build(weights)
    only = {"layers.0.weight": torch.nn.Parameter(torch.ones(3, 2))}
    only["layers.0.weight"].grad = torch.ones(3, 2)
    MuonSettings().build(only).step()


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_state_are_estimated_by_part(tied: bool) -> None:
    spec = DecoderConfig(layers=4, width=32, heads=2, vocab_size=50, tied=tied)
    for part in (spec.whole, Part(0, 1), Part(1, 3), Part(3, 4)):
        weights = dict(spec.build(part).named_weights())
        nbytes = sum(
            4 * math.prod(slot)
            for name, weight in weights.items()
            for slot in MuonSettings.slot_shapes(name, tuple(weight.shape)).values()
        )
        assert MuonSettings().state_bytes(spec, part) == pytest.approx(nbytes, rel=0.1)
