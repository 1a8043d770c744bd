"""The format of the library compressed-tensors, which vLLM and transformers read.

Codes of 4 bits are packed into int32 along a row, the first in the lowest bits; zero points along
the rows. Codes of int8 with rounded inputs are plain. Shapes: O outputs, I inputs, G groups of a
row.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpillm.errors import CheckpointError
from mpillm.models.layers.stored.stored_codes import (
    GROUPS,
    StoredCodes,
    StoredFormat,
    pack_pairs,
    unpack_pairs,
)

METHOD, CONFIG_KEY = "compressed-tensors", "quantization_config"
PACKED, PLAIN = "pack-quantized", "int-quantized"
SCALE, ZERO, SHAPE, CODES = ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_packed"
# Of an int32: rows or columns that are packed together.
IN_A_WORD = 8


def packed_config(layout: StoredFormat, ignored: list[str]) -> dict[str, Any]:
    """Return the entry of `config.json`; `ignored`: the linear layers that are not packed."""
    weights = {
        "num_bits": layout.bits,
        "type": "int",
        "symmetric": layout.bits == 8,
        "strategy": "group" if layout.group else "channel",
        "group_size": layout.group or None,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if layout.activations else None,
        "output_activations": None,
        "format": PLAIN if layout.activations else PACKED,
    }
    return {
        "quant_method": METHOD,
        "format": group["format"],
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {"group_0": group},
    }


def read_packed_config(facts: Mapping[str, Any]) -> StoredFormat | None:
    """Return the format that a `config.json` names; None: its weights are plain.

    Raises CheckpointError for one that is not read.
    """
    found = facts.get(CONFIG_KEY)
    if not isinstance(found, dict):
        return None
    groups = found.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    one = found.get("quant_method") == METHOD and isinstance(groups, dict) and len(groups) == 1
    weights = group.get("weights") if one and isinstance(group, dict) else None
    if isinstance(weights, dict) and isinstance(group, dict):
        bits, size = weights.get("num_bits"), weights.get("group_size") or 0
        layout = StoredFormat(int(bits or 0), int(size), bool(group.get("input_activations")))
        known = (layout.bits, layout.group) in ((8, 0), *((4, size) for size in GROUPS))
        kind = weights.get("type"), weights.get("actorder")
        if known and kind == ("int", None) and found.get("format") in (PACKED, PLAIN):
            return layout
    raise CheckpointError(
        f"its {CONFIG_KEY} is {found.get('quant_method')!r}, {found.get('format')!r}, which is not "
        f"read; of {METHOD} int8 a row and int4 in groups of {', '.join(map(str, GROUPS))} are"
    )


def packed_tensors(layer: str, stored: StoredCodes) -> dict[str, Tensor]:
    """Return the tensors of a layer by their names."""
    scales = stored.tensors["scales"]
    if stored.format.activations:
        return {f"{layer}.weight": stored.tensors["codes"], layer + SCALE: scales}
    found = {
        layer + CODES: _words(stored),
        layer + SCALE: scales,
        layer + SHAPE: torch.tensor(stored.shape),
    }
    zeros_OG = stored.tensors.get("zeros")
    if zeros_OG is not None:
        rest = -len(zeros_OG) % IN_A_WORD
        padded_GO = torch.nn.functional.pad(zeros_OG.t(), (0, rest))
        words_GW = _int32(pack_pairs(padded_GO))
        found[layer + ZERO] = words_GW.t().contiguous()
    return found


def _words(stored: StoredCodes) -> Tensor:
    codes = stored.tensors["codes"]
    if stored.format.bits == 8:
        # From 1 to 255: the bits have no sign.
        codes = (codes.to(torch.int16) + 128).to(torch.uint8)
    rest = -codes.shape[1] % 4
    return _int32(torch.nn.functional.pad(codes, (0, rest)))


def _int32(bytes_RB: Tensor) -> Tensor:
    """Read the bytes of each row as int32. A single row may have any stride, so it is flat."""
    return bytes_RB.flatten().view(torch.int32).view(len(bytes_RB), -1)


def _uint8(words_RW: Tensor) -> Tensor:
    return words_RW.flatten().view(torch.uint8).view(len(words_RW), -1)


def unpacked(tensors: Mapping[str, Tensor], shape: tuple[int, int], layout: StoredFormat) -> Tensor:
    """Return the values (O, I) of a layer in float32; `tensors`: by the ends of their names."""
    outputs, inputs = shape
    scale_OG = tensors[SCALE].float().view(outputs, -1)
    if CODES not in tensors:
        codes_OI = tensors[".weight"].float()
    else:
        bytes_OB = _uint8(tensors[CODES])
        codes = bytes_OB if layout.bits == 8 else unpack_pairs(bytes_OB)
        codes_OI = codes[:, :inputs].float() - (128 if layout.bits == 8 else 8)
    zero_OG = torch.zeros_like(scale_OG)
    if ZERO in tensors:
        zero_OG = unpack_pairs(_uint8(tensors[ZERO].t()))[:, :outputs].t().float() - 8
    codes_OGN = codes_OI.view(outputs, scale_OG.shape[1], -1)
    found: Tensor = ((codes_OGN - zero_OG[..., None]) * scale_OG[..., None]).flatten(1)
    return found
