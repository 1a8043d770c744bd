"""Products with stored weights on CPUs, and which of them to take for how many rows.

torch's kernels of packed weights have private names: each is compared once with the decoded
product, and what differs, fails or is missing is not taken. Shapes: R rows of inputs, O outputs, I
inputs, G groups of a row.
"""

from collections.abc import Mapping
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mpillm.models.layers.stored.stored_codes import Grid, StoredCodes, StoredFormat

StoredKernel = Literal["packed", "integers", "copy"]
"""packed: reads the codes, inputs in bfloat16. integers: int8 inputs, a scale a row. copy: the
decoded weight is kept in the inputs' dtype, and multiplied as any other.
"""
# By bits: measured on a Xeon with AMX, passes of SmolLM2-135M, one thread (benchmarks/compress.py).
# Codes are fewer bytes to read than a copy in bfloat16, and each row decodes them again.
MOST_PACKED_ROWS: Mapping[int, int] = MappingProxyType({8: 5, 4: 8})
# Rounding the inputs and scaling the outputs takes passes over them, which only a large weight
# outweighs: 2048 × 5632 at 8 rows 0.98 ms and 1.47 of bfloat16, at 128 rows 3.6 and 3.0.
MOST_INTEGER_ROWS, LEAST_INTEGER_WEIGHTS = 64, 4 << 20
# Kernels read rows in vectors: what is no multiple has not been measured.
ROW_MULTIPLE, OUTPUT_MULTIPLE = 32, 16
# Of a probe, relative to the largest output: bfloat16 has 8 significant bits.
TOLERANCE = 0.02


@lru_cache(maxsize=1 << 16)
def choose_kernel(
    rows: int, shape: tuple[int, int], layout: StoredFormat, device: torch.device
) -> StoredKernel:
    """Choose the kernel of `rows` rows of inputs and a weight (O, I): a pure function of these and
    of the processor.
    """
    # An expert may have no rows at all.
    if device.type != "cpu" or not rows:
        return "copy"
    if rows <= MOST_PACKED_ROWS[layout.bits] and packs(shape, layout):
        return "packed"
    large = shape[0] * shape[1] >= LEAST_INTEGER_WEIGHTS and rows <= MOST_INTEGER_ROWS
    if layout.activations and (large or not has_bfloat16_units()) and integers_work():
        return "integers"
    return "copy"


@cache
def has_bfloat16_units() -> bool:
    """Return whether the processor multiplies bfloat16 faster than float32: by AMX or AVX-512."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    found = (getattr(torch.cpu, name, None) for name in checks)
    return any(bool(check()) for check in found if check is not None)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which a model with stored weights computes fastest on `device`."""
    fast = device.type != "cpu" or has_bfloat16_units()
    return torch.bfloat16 if fast else torch.float32


def packs(shape: tuple[int, int], layout: StoredFormat) -> bool:
    """Return whether there is a kernel that reads the codes of such a weight."""
    outputs, inputs = shape
    if outputs % OUTPUT_MULTIPLE or inputs % ROW_MULTIPLE:
        return False
    return packed_works(layout.bits, layout.group)


def pack(stored: StoredCodes) -> tuple[Tensor, Tensor]:
    """Order the codes and the scales as the packed kernel reads them."""
    if stored.format.bits == 8:
        # A module that moves to another dtype takes its scales along.
        scale_O = stored.tensors["scales"][:, 0].to(torch.bfloat16).contiguous()
        return stored.tensors["codes"].contiguous(), scale_O
    convert: Any = torch._convert_weight_to_int4pack_for_cpu
    codes: Tensor = convert(stored.plain_codes.to(torch.int32), 1)
    grid = stored.grid
    # The kernel's value is (code − 8) · scale + offset.
    offset_OG = (8 - grid.zero_OG) * grid.scale_OG
    both_GO2 = torch.stack((grid.scale_OG.t(), offset_OG.t()), -1)
    return codes, both_GO2.to(torch.bfloat16).contiguous()


def packed_product(x_RI: Tensor, packed: tuple[Tensor, Tensor], layout: StoredFormat) -> Tensor:
    """Return x · weightᵀ (R, O) in bfloat16, of `x_RI` in bfloat16."""
    codes, scales = packed
    kernels: Any = torch
    if layout.bits == 8:
        found: Tensor = kernels._weight_int8pack_mm(x_RI, codes, scales)
    else:
        found = kernels._weight_int4pack_mm_for_cpu(x_RI, codes, layout.group, scales)
    return found


def integer_product(x_RI: Tensor, codes_OI: Tensor, scale_O: Tensor) -> Tensor:
    """Return x · weightᵀ (R, O) in the dtype of `x_RI`, whose rows are rounded to int8."""
    kernel: Any = torch._int_mm
    codes_RI, scale_R1 = rounded_rows(x_RI)
    product_RO = torch.mul(kernel(codes_RI, codes_OI.t()), scale_R1)
    return torch.mul(product_RO, scale_O, out=torch.empty_like(product_RO, dtype=x_RI.dtype))


def rounded_rows(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8 with a scale of its own: codes (R, I), scales (R, 1) in float32."""
    low_R1, high_R1 = torch.aminmax(x_RI, dim=1, keepdim=True)
    largest_R1 = torch.maximum(high_R1, -low_R1).float()
    # Of a row of zeros any scale will do.
    scale_R1 = largest_R1.clamp_min_(torch.finfo(torch.float32).tiny).div_(127)
    return (x_RI / scale_R1).round_().clamp_(-127, 127).to(torch.int8), scale_R1


@cache
def packed_works(bits: int, group: int) -> bool:
    """Compare the kernel of packed codes with the decoded product, once a format."""
    layout = StoredFormat(bits, group)
    stored, x_RI = _example(layout)
    try:
        found_RO = packed_product(x_RI.bfloat16(), pack(stored), layout)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return near(found_RO, F.linear(x_RI.bfloat16().float(), stored.decoded()))


@cache
def integers_work() -> bool:
    """Compare the kernel of integers with the decoded product, once."""
    stored, x_RI = _example(StoredFormat(8))
    try:
        scale_O = stored.tensors["scales"][:, 0].float()
        found_RO = integer_product(x_RI, stored.tensors["codes"], scale_O)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return near(found_RO, F.linear(x_RI, stored.decoded()))


def _example(layout: StoredFormat) -> tuple[StoredCodes, Tensor]:
    """Make a weight with a vector's rest of outputs, and inputs."""
    chance = torch.Generator().manual_seed(1)
    inputs = 2 * layout.group if layout.group else 96
    values_OI = torch.randn(80, inputs, generator=chance)
    # Zero points that differ from group to group.
    values_OI += torch.linspace(-0.5, 0.5, 80)[:, None]
    grid = Grid.of(values_OI, layout)
    return grid.store(grid.codes(values_OI)), torch.randn(3, inputs, generator=chance)


def near(found_RO: Tensor, expected_RO: Tensor) -> bool:
    """Return whether a kernel's outputs are those expected, within the rounding of bfloat16."""
    error = (found_RO.float() - expected_RO).abs().max()
    return bool(error <= TOLERANCE * expected_RO.abs().max())
