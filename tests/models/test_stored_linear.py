"""Stored weights: how far codes are from their values, and all kernels next to the decoded one."""

import pytest
import torch

from mpillm.errors import CheckpointError
from mpillm.models.layers.stored import stored_kernels
from mpillm.models.layers.stored.stored_codes import (
    COMPRESSED,
    Grid,
    StoredFormat,
    best_grid,
    pack_pairs,
    stored_format,
    unpack_pairs,
)
from mpillm.models.layers.stored.stored_linear import StoredHead, StoredLinear

INT8, INT4 = StoredFormat(8), StoredFormat(4, 32)
FORMATS = {"int8": INT8, "int4": INT4, "int4 of 64": StoredFormat(4, 64)}
CPU = torch.device("cpu")


def values(outputs: int = 48, inputs: int = 128) -> torch.Tensor:
    chance = torch.Generator().manual_seed(1)
    found = torch.randn(outputs, inputs, generator=chance)
    # A range that is not around 0, another one in each row, and a row of zeros.
    found += torch.linspace(-2, 2, outputs)[:, None]
    found[3] = 0
    return found


def layer_of(layout: StoredFormat, bias: bool = False) -> StoredLinear:
    grid = Grid.of(values(), layout)
    made = StoredLinear(layout, (48, 128), torch.nn.Parameter(torch.randn(48)) if bias else None)
    made.fill(grid.store(grid.codes(values())).tensors)
    return made.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_rounded_to_the_nearest_code(name: str) -> None:
    layout, values_OI = FORMATS[name], values()
    grid = Grid.of(values_OI, layout)
    stored = grid.store(grid.codes(values_OI))
    found_OI = stored.decoded()
    step_OI = grid.scale_OG.repeat_interleave(128 // grid.scale_OG.shape[1], 1)
    # Half a step, and what the scale's rounding to 8 bits and the zero point's to a code cut off.
    assert ((found_OI - values_OI).abs() <= step_OI * (1.1 if layout.bits == 4 else 1)).all()
    inside = (found_OI - values_OI).abs() <= step_OI * 0.5001
    assert inside.float().mean() > 0.95
    assert not found_OI[3].any()
    sizes = {name: (str(t.dtype)[6:], tuple(t.shape)) for name, t in stored.tensors.items()}
    assert sizes == layout.tensors_of((48, 128))
    assert stored.shape == (48, 128)


def test_pairs_of_codes_come_back() -> None:
    codes_OI = torch.arange(64, dtype=torch.uint8).view(2, 32) % 16
    assert torch.equal(unpack_pairs(pack_pairs(codes_OI)), codes_OI)


def test_a_chosen_grid_has_a_smaller_error_than_the_whole_range() -> None:
    values_OI = values()
    values_OI[:, 7] *= 8
    weight_I = torch.ones(128)
    weight_I[7] = 1e-3

    def error(grid: Grid) -> float:
        return float(((grid.rounded(values_OI) - values_OI).square() * weight_I).sum())

    assert error(best_grid(values_OI, INT4, weight_I)) < 0.8 * error(Grid.of(values_OI, INT4))


@pytest.mark.parametrize("kernel", ["packed", "integers", "copy"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_kernel_computes_the_product_of_the_decoded_weight(
    kernel: stored_kernels.StoredKernel, name: str, dtype: torch.dtype
) -> None:
    layout = FORMATS[name]
    if kernel == "integers" and (layout.bits == 4 or not stored_kernels.integers_work()):
        pytest.skip("int8 codes of a row, and torch's kernel of integers")
    if kernel == "packed" and not stored_kernels.packs((48, 128), layout):
        pytest.skip("torch has no such kernel here")
    layer = layer_of(layout, bias=True)
    layer.kernel = kernel
    for shape in ((1, 128), (2, 5, 128)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        expected = torch.nn.functional.linear(x.float(), layer.stored.decoded(), layer.bias)
        found = layer.to(dtype)(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02 * 30)
        layer.to(torch.float32)


def test_a_gradient_of_the_inputs_passes() -> None:
    layer = layer_of(INT8)
    x = torch.randn(2, 128, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.stored.decoded().sum(0).expand(2, -1))


def test_a_kernel_that_is_missing_or_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "_weight_int8pack_mm": lambda x, codes, _: x @ codes.to(x.dtype).t(),
        "_int_mm": lambda x, codes: (x.float() @ codes.float()).int() + 9999,
    }
    for name, kernel in wrong.items():
        monkeypatch.setattr(torch, name, kernel)
    monkeypatch.delattr(torch, "_weight_int4pack_mm_for_cpu", raising=False)
    monkeypatch.setattr(stored_kernels, "has_bfloat16_units", lambda: False)
    checks = (
        stored_kernels.choose_kernel,
        stored_kernels.packed_works,
        stored_kernels.integers_work,
    )
    for check in checks:
        check.cache_clear()
    try:
        whole = StoredFormat(8, activations=True)
        for layout in (whole, INT4):
            for rows in (1, 8, 200):
                kernel = stored_kernels.choose_kernel(rows, (64, 64), layout, CPU)
                assert kernel == "copy"
    finally:
        for check in checks:
            check.cache_clear()


def test_no_more_rows_than_measured_take_the_codes() -> None:
    most = stored_kernels.MOST_PACKED_ROWS[8]
    if not (stored_kernels.packs((64, 64), INT8) and stored_kernels.has_bfloat16_units()):
        pytest.skip("no kernel of packed codes here")
    chosen = [stored_kernels.choose_kernel(n, (64, 64), INT8, CPU) for n in (0, 1, most, most + 1)]
    assert chosen == ["copy", "packed", "packed", "copy"]
    # Widths that no kernel was measured with.
    assert stored_kernels.choose_kernel(1, (60, 64), INT8, CPU) == "copy"
    assert stored_kernels.choose_kernel(1, (64, 72), INT8, CPU) == "copy"


def test_a_head_computes_few_positions_by_codes_and_many_by_its_weight() -> None:
    stored = layer_of(INT8).stored
    linear = torch.nn.Linear(128, 48, bias=False)
    linear.weight.data = stored.decoded()
    head = StoredHead(linear, stored)
    assert head.weight is linear.weight
    few, many = torch.randn(1, 1, 128), torch.randn(1, 9, 128)
    with torch.no_grad():
        made = head.product(few)
        if made is not None:
            torch.testing.assert_close(made, head(few), rtol=0.02, atol=0.5)
        assert head.product(many) is None
    assert head.product(few.requires_grad_()) is None


@pytest.mark.parametrize(
    "fact", [{"format": {"bits": 3}}, {"format": {"bits": 4, "group": 5, "activations": False}}]
)
def test_a_damaged_format_is_refused(fact: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="is damaged"):
        stored_format({COMPRESSED: fact})
    assert stored_format({}) is None
