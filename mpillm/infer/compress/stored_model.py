"""A model with stored layers in a checkpoint: its names, and the module that computes with it."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from mpillm.errors import CheckpointError
from mpillm.models.adapt import block_layers
from mpillm.models.layers.stored.stored_codes import stored_format
from mpillm.models.layers.stored.stored_kernels import compute_dtype
from mpillm.models.layers.stored.stored_linear import StoredHead, StoredLinear
from mpillm.models.part_module import PartModule, weight_shapes
from mpillm.models.spec import ModelSpec
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.names import stored_name, weight_name

OTHERS = "bfloat16"
"""The dtype of the other weights next to stored ones."""


def check_stored_model(
    checkpoint: Checkpoint, spec: ModelSpec
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype and the shape of each weight of a checkpoint with stored layers.

    Raises CheckpointError unless each is there, as codes or plain.
    """
    layout = stored_format(checkpoint.facts)
    assert layout is not None
    held, found = checkpoint.tensors, CheckpointSource(checkpoint).weights
    count = sum(math.prod(shape) for shape in found.values())
    # Compared first: a wrong size must not be allocated.
    if spec.blocks > len(held) or spec.parameters > 2 * count:
        raise CheckpointError(
            f"{checkpoint.folder} holds {count:,} parameters, its recipe asks for "
            f"{spec.parameters:,}; use another checkpoint"
        )
    weights = weight_shapes(spec)
    for name, (_, shape) in weights.items():
        plain = held.get(weight_name(name))
        if plain is not None:
            fits = (plain.dtype, plain.shape) == (OTHERS, shape)
        else:
            codes = held.get(stored_name(name, "codes"))
            own = None if codes is None else layout.of_codes(codes.dtype)
            fits = own is not None and len(shape) == 2 and own.divides(shape[1])
            fits = fits and all(
                (entry := held.get(stored_name(name, part))) is not None
                and (entry.dtype, entry.shape) == wanted
                for part, wanted in own.tensors_of(shape).items()  # type: ignore[union-attr]
            )
        if not fits:
            raise CheckpointError(
                f"{checkpoint.folder} holds {name} neither as {OTHERS} nor as {layout.bits} bits "
                f"of shape {list(shape)}; use another checkpoint"
            )
    return weights


def load_stored(model: PartModule, checkpoint: Checkpoint) -> PartModule:
    """Fill a model from a checkpoint with stored layers, whose linear layers are replaced.

    `model`: whole or a part, without values. It computes in the dtype that is fastest on a CPU.
    """
    layout = stored_format(checkpoint.facts)
    assert layout is not None
    tensors: dict[str, torch.Tensor] = {}
    model = model.to(getattr(torch, OTHERS))
    for name, layer in list(block_layers(model)):
        weight = f"{name}.weight"
        if stored_name(weight, "codes") not in checkpoint.tensors:
            continue
        made = StoredLinear(layout, (layer.out_features, layer.in_features), layer.bias)
        for part, tensor in made.stored.tensors.items():
            tensors[stored_name(weight, part)] = tensor
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, made)
    rows = {}
    for name, value in model.named_weights():
        if stored_name(name, "codes") in checkpoint.tensors:
            rows[name] = value
        else:
            tensors[weight_name(name)] = value
    checkpoint.load(tensors)
    _fill_rows(model, CheckpointSource(checkpoint), rows)
    return model.to(compute_dtype(torch.device("cpu")))


@torch.no_grad()
def _fill_rows(
    model: PartModule, source: CheckpointSource, rows: Mapping[str, nn.Parameter]
) -> None:
    """Fill embeddings and heads, which are stored as int8 a row."""
    for name, value in rows.items():
        stored = source.read_codes(name)
        assert stored is not None
        value.copy_(stored.decoded())
        head = getattr(model, "head", None)
        if isinstance(head, nn.Linear) and head.weight is value:
            model.head = StoredHead(head, stored)
