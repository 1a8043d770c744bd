"""A checkpoint of mpillm as a source of tensors."""

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from mpillm.errors import CheckpointError
from mpillm.models.layers.stored.stored_codes import StoredCodes, StoredFormat, stored_format
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.index import ITEM_BYTES
from mpillm.weights.names import module_names, stored_name, stored_names, weight_name
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
        """The shapes of the weights, by the module's names, of those stored as codes, too."""
        names = module_names(self.tensors)
        found = {name: self.tensors[stored].shape for name, stored in names.items()}
        for name in stored_names(self.tensors):
            found[name] = self._layout(name).shape_of(
                self.tensors[stored_name(name, "codes")].shape
            )
        return found

    def read_weight(self, name: str) -> Tensor:
        """Return a weight by the module's name; what codes mean, in float32.

        Raises CheckpointError as `read` does.
        """
        stored = self.read_codes(name)
        return self.read(weight_name(name)) if stored is None else stored.decoded()

    def read_codes(self, name: str) -> StoredCodes | None:
        """Return a weight that is stored as codes, by the module's name; None: it is plain."""
        if stored_name(name, "codes") not in self.tensors:
            return None
        layout = self._layout(name)
        shape = layout.shape_of(self.tensors[stored_name(name, "codes")].shape)
        parts = {part: self.read(stored_name(name, part)) for part in layout.tensors_of(shape)}
        return StoredCodes(layout, parts)

    def _layout(self, name: str) -> StoredFormat:
        return self._format.of_codes(self.tensors[stored_name(name, "codes")].dtype)

    @cached_property
    def _format(self) -> StoredFormat:
        layout = stored_format(self.facts)
        if layout is None:
            raise CheckpointError(f"{self.path} has codes without their format; use another")
        return layout

    def read(self, name: str, box: Box | None = None) -> Tensor:
        info = self.tensors[name]
        wanted = whole_box(info.shape) if box is None else box
        values = torch.empty(wanted.size, dtype=getattr(torch, info.dtype))
        self.checkpoint.load({name: TensorSlice(values, wanted.start, info.shape)})
        return values
