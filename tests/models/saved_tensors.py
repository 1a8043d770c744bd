"""What autograd holds after a forward pass."""

import torch
from torch.autograd.graph import saved_tensors_hooks

from mpillm.models.part_module import Fields, PartModule, Streams


def saved_bytes(
    module: PartModule, fields: Fields, streams: Streams, streams_are_kept: bool = True
) -> int:
    """Sum the memory that autograd holds after a forward pass, without weights and tables.

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
    for each in (*module.parameters(), *module.buffers(), *fields.values(), *streams):
        found.pop(each.untyped_storage().data_ptr(), None)
    assert output.outputs
    received = sum(stream.untyped_storage().nbytes() for stream in streams)
    return sum(found.values()) + streams_are_kept * received
