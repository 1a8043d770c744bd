"""A checkpoint of mpillm as a source of tensors."""

from typing import ClassVar

import torch
from torch import Tensor

from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.index import ITEM_BYTES
from mpillm.weights.names import module_names, weight_name
from mpillm.weights.slices import Box, TensorSlice, whole_box
from mpillm.weights.tensor_source import TensorInfo, TensorSource


class CheckpointSource(TensorSource):
    """The tensors of a checkpoint: weights under `model/`, the optimizer's under `optimizer/`."""

    kind: ClassVar[str] = "checkpoint"

    def __init__(self, checkpoint: Checkpoint) -> None:
        tensors = {
            name: TensorInfo(
                entry.dtype,
                entry.shape,
                ITEM_BYTES[entry.dtype] * whole_box(entry.shape).numel,
            )
            for name, entry in checkpoint.tensors.items()
        }
        super().__init__(checkpoint.folder, tensors, checkpoint.facts)
        self.checkpoint = checkpoint

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights, by the module's names."""
        names = module_names(self.tensors)
        return {name: self.tensors[stored].shape for name, stored in names.items()}

    def read_weight(self, name: str) -> Tensor:
        """Return a weight by the module's name. Raises CheckpointError as `read` does."""
        return self.read(weight_name(name))

    def read(self, name: str, box: Box | None = None) -> Tensor:
        info = self.tensors[name]
        wanted = whole_box(info.shape) if box is None else box
        values = torch.empty(wanted.size, dtype=getattr(torch, info.dtype))
        self.checkpoint.load({name: TensorSlice(values, wanted.start, info.shape)})
        return values
