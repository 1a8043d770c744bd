"""The memory that autograd holds of a part of a model, and its peak in a step."""

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mpillm.bench.tensor_peak import peak_tensor_bytes
from mpillm.models.block_settings import BlockSettings
from mpillm.models.part_module import Fields, PartModule, Streams, create
from mpillm.models.spec import Part


def kept_bytes(
    config: BlockSettings,
    part: Part,
    rows: int,
    recompute: Any,
    dtype: Any,
    given: dict[str, torch.Tensor] | None = None,
) -> int:
    """Sum the memory that a forward pass of one stream leaves, see `saved_bytes`.

    `given`: the fields at the beginning; None: token ids.
    """
    module = create(config, 1, part=part).to(dtype)
    module.set_recompute(recompute)
    ids = torch.zeros(rows, config.context, dtype=torch.int64)
    fields = dict(given or {"ids": ids}) if config.begins(part) else {}
    if config.drops:
        fields["dropout_keys"] = torch.arange(rows)
    stream = torch.randn(rows, config.context, config.width, dtype=dtype, requires_grad=True)
    if config.begins(part):
        return saved_bytes(module, fields, ())
    counted = dtype == torch.float32 or config.norm != "rmsnorm"
    return saved_bytes(module, fields, (stream,), counted)


def saved_bytes(
    module: PartModule, fields: Fields, streams: Streams, streams_are_kept: bool = True
) -> int:
    """Sum the memory that a forward pass leaves, of pivots and autograd, without weights and
    tables.

    A layer that is recomputed gives handles in place of tensors: its arguments are kept. So the
    `streams` are counted, be they saved as they are or not.
    """
    found: dict[int, int] = {}
    tensors: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        tensors.append(tensor)  # else another tensor may get its address
        return tensor

    # The hooks inside of a recomputed layer come first, and give its tensors no place here.
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module.forward_part(fields, streams)
    for pivot in output.pivots:
        found[pivot.untyped_storage().data_ptr()] = pivot.untyped_storage().nbytes()
    for each in (*module.parameters(), *module.buffers(), *fields.values(), *streams):
        found.pop(each.untyped_storage().data_ptr(), None)
    assert output.outputs
    received = sum(stream.untyped_storage().nbytes() for stream in streams)
    return sum(found.values()) + streams_are_kept * received


def peak_of_a_step(config: BlockSettings, part: Part, rows: int, recompute: Any) -> int:
    """Return the most bytes that torch holds in a step of a middle part, above those before it."""
    module = create(config, 1, part=part)
    module.set_recompute(recompute)
    stream = torch.randn(rows, config.context, config.width)
    fields = {"dropout_keys": torch.arange(rows)} if config.drops else {}

    def step() -> None:
        given = stream.detach().requires_grad_()
        module.forward_part(fields, (given,)).outputs[0].backward(stream)

    step()  # gradients of weights stay, and belong to no step
    return peak_tensor_bytes(step)


def check_peak(config: BlockSettings, recompute: Any) -> tuple[int, int]:
    """Check that the peak of a step is what is kept and one block, of 6 of the `config`'s 8.

    Returns the bytes that are kept, and those without recomputation.
    """
    part, rows = Part(1, 7), 4
    kept, again = config.recompute_bytes(part, rows, 4, recompute)
    peak = peak_of_a_step(config, part, rows, recompute)
    # The stream and its gradient are there before the step.
    outside = 2 * rows * config.context * config.width * 4
    counted = kept + again + config.working_bytes(rows) - outside
    assert counted == pytest.approx(peak, rel=0.1)
    return kept, config.activation_bytes(part, rows)
