"""Weights as whole numbers: int8 with a scale a row, int4 with a scale and a zero point a group.

value = (code − zero) · scale. Zero points are whole numbers, as other tools store them. Scales have
the 8 significant bits of bfloat16: kernels that take them in bfloat16 round nothing.

Shapes: O outputs, I inputs, G groups of a row, N inputs of a group.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mpillm.errors import CheckpointError

COMPRESSED = "compressed"
"""The fact of a compressed checkpoint: `method`, its options and, of stored weights, `format`."""
GROUPS = (32, 64, 128, 256)
"""Inputs that may share a scale in int4: what kernels take."""


@dataclass(frozen=True)
class StoredFormat:
    """How a weight is stored, and whether the layer's inputs are rounded, too."""

    bits: int
    """8 or 4."""
    group: int = 0
    """Inputs that share a scale; 0: a whole row."""
    activations: bool = False
    """Inputs may be rounded to int8, with a scale a token."""

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> "StoredFormat":
        """Read it from the facts of a checkpoint. Raises KeyError, TypeError and ValueError."""
        found = cls(int(facts["bits"]), int(facts["group"]), bool(facts["activations"]))
        if (found.bits, found.group) not in ((8, 0), *((4, group) for group in GROUPS)):
            raise ValueError(f"{found.bits} bits in groups of {found.group} are no stored weights")
        return found

    def to_facts(self) -> dict[str, Any]:
        return asdict(self)

    def of_codes(self, dtype: str) -> "StoredFormat":
        """Return the format of codes of a dtype: a model's embedding and head have int8."""
        return self if self.bits == (8 if dtype == "int8" else 4) else BYTES

    @property
    def largest(self) -> int:
        """The largest code; the smallest is −127 of 8 bits and 0 of 4."""
        return 127 if self.bits == 8 else 15

    @property
    def smallest(self) -> int:
        return -127 if self.bits == 8 else 0

    def groups_of(self, inputs: int) -> int:
        """Return the groups of a row."""
        return inputs // self.group if self.group else 1

    def divides(self, inputs: int) -> bool:
        """Return whether a row of `inputs` can be stored."""
        return inputs % self.group == 0 if self.group else True

    def tensors_of(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the dtype and the shape of each tensor of a weight (O, I)."""
        outputs, inputs = shape
        groups = self.groups_of(inputs)
        if self.bits == 8:
            return {"codes": ("int8", (outputs, inputs)), "scales": ("bfloat16", (outputs, 1))}
        return {
            "codes": ("uint8", (outputs, inputs // 2)),
            "scales": ("bfloat16", (outputs, groups)),
            "zeros": ("uint8", (outputs, groups)),
        }

    def shape_of(self, codes: tuple[int, ...]) -> tuple[int, int]:
        """Return the shape (O, I) of a weight, of the shape of its codes."""
        outputs, columns = codes
        return outputs, columns if self.bits == 8 else 2 * columns


BYTES = StoredFormat(8)
"""Of embeddings and heads: int8 a row."""


def stored_format(facts: Mapping[str, Any]) -> StoredFormat | None:
    """Return how the layers of a checkpoint are stored; None: as plain weights.

    Raises CheckpointError where its fact is damaged.
    """
    fact = facts.get(COMPRESSED)
    if not isinstance(fact, dict) or fact.get("format") is None:
        return None
    try:
        return StoredFormat.read(fact["format"])
    except (KeyError, TypeError, ValueError) as failure:
        raise CheckpointError(
            f"the fact {COMPRESSED} of the checkpoint is damaged ({failure}); use another"
        ) from failure


@dataclass(frozen=True)
class Grid:
    """The values that codes mean: scales (O, G) in float32, and whole zero points (O, G)."""

    format: StoredFormat
    scale_OG: Tensor
    zero_OG: Tensor

    @classmethod
    def of(cls, values_OI: Tensor, layout: StoredFormat, share_OG: Tensor | float = 1.0) -> "Grid":
        """Cover the range of each group; `share_OG`: of the range, what is beyond is cut off."""
        groups = layout.groups_of(values_OI.shape[1])
        values_OGN = by_group(values_OI, groups)
        if layout.bits == 8:
            range_OG = values_OGN.abs().amax(-1) * share_OG
            scale_OG = _positive(range_OG / layout.largest)
            return cls(layout, scale_OG, torch.zeros_like(scale_OG))
        # The range includes 0, so that the zero point is a code.
        low_OG = values_OGN.amin(-1).clamp_max(0) * share_OG
        high_OG = values_OGN.amax(-1).clamp_min(0) * share_OG
        scale_OG = _positive((high_OG - low_OG) / layout.largest)
        zero_OG = (-low_OG / scale_OG).round().clamp(0, layout.largest)
        return cls(layout, scale_OG, zero_OG)

    def codes(self, values_OI: Tensor) -> Tensor:
        """Return the nearest codes (O, I), in float32."""
        groups_OGN = by_group(values_OI, self.scale_OG.shape[1])
        codes_OGN = (groups_OGN / self.scale_OG[..., None]).add_(self.zero_OG[..., None]).round_()
        found: Tensor = codes_OGN.clamp_(self.format.smallest, self.format.largest).flatten(1)
        return found

    def values(self, codes_OI: Tensor) -> Tensor:
        """Return what the codes mean (O, I), in float32."""
        codes_OGN = by_group(codes_OI, self.scale_OG.shape[1])
        values_OGN: Tensor = (codes_OGN - self.zero_OG[..., None]) * self.scale_OG[..., None]
        return values_OGN.flatten(1)

    def rounded(self, values_OI: Tensor) -> Tensor:
        """Return the nearest values that codes mean (O, I), in float32."""
        return self.values(self.codes(values_OI))

    def store(self, codes_OI: Tensor) -> "StoredCodes":
        """Return the tensors of a checkpoint."""
        scales = self.scale_OG.to(torch.bfloat16)
        if self.format.bits == 8:
            return StoredCodes(self.format, {"codes": codes_OI.to(torch.int8), "scales": scales})
        return StoredCodes(
            self.format,
            {
                "codes": pack_pairs(codes_OI.to(torch.uint8)),
                "scales": scales,
                "zeros": self.zero_OG.to(torch.uint8),
            },
        )


@dataclass(frozen=True)
class StoredCodes:
    """The tensors of a stored weight: `codes`, `scales` and, of int4, `zeros`."""

    format: StoredFormat
    tensors: Mapping[str, Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's (O, I)."""
        return self.format.shape_of(tuple(self.tensors["codes"].shape))

    @property
    def plain_codes(self) -> Tensor:
        """The codes (O, I), one an element: int8, or uint8 of int4."""
        codes = self.tensors["codes"]
        return codes if self.format.bits == 8 else unpack_pairs(codes)

    @property
    def grid(self) -> Grid:
        scale_OG = self.tensors["scales"].float()
        zeros = self.tensors.get("zeros")
        zero_OG = torch.zeros_like(scale_OG) if zeros is None else zeros.float()
        return Grid(self.format, scale_OG, zero_OG)

    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values (O, I)."""
        return self.grid.values(self.plain_codes).to(dtype)


def by_group(values_OI: Tensor, groups: int) -> Tensor:
    """Return the values (O, G, N) in float32."""
    return values_OI.float().reshape(len(values_OI), groups, -1)


def pack_pairs(codes_OI: Tensor) -> Tensor:
    """Pack codes of 4 bits, two a byte: (O, I / 2), the first in the lower half."""
    packed: Tensor = codes_OI[:, ::2] | (codes_OI[:, 1::2] << 4)
    return packed.contiguous()


def unpack_pairs(packed: Tensor) -> Tensor:
    """Unpack codes of 4 bits: (O, I), uint8."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def best_grid(
    values_OI: Tensor, layout: StoredFormat, weight_I: Tensor, least: float = 0.7, steps: int = 12
) -> Grid:
    """Choose each group's share of its range by the least squared error, inputs by `weight_I`.

    A cut of rare large values gives the others a finer grid (the clipping of Lin et al. 2023, AWQ).
    """
    values_OI = values_OI.float()
    groups = layout.groups_of(values_OI.shape[1])
    best_OG = torch.full((len(values_OI), groups), math.inf)
    chosen = Grid.of(values_OI, layout)
    for step in range(steps + 1):
        grid = Grid.of(values_OI, layout, 1 - (1 - least) * step / steps)
        error_OI = (grid.rounded(values_OI) - values_OI).square_() * weight_I
        error_OG = by_group(error_OI, groups).sum(-1)
        better_OG = error_OG < best_OG
        best_OG = torch.where(better_OG, error_OG, best_OG)
        chosen = Grid(
            layout,
            torch.where(better_OG, grid.scale_OG, chosen.scale_OG),
            torch.where(better_OG, grid.zero_OG, chosen.zero_OG),
        )
    return chosen


def _positive(scale: Tensor) -> Tensor:
    """Round scales to bfloat16; 1 for a group of zeros."""
    scale = scale.to(torch.bfloat16).float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))
