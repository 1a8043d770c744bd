"""A Hugging Face folder of compressed-tensors as a source of tensors with plain values."""

from typing import ClassVar

from torch import Tensor

from mpillm.errors import CheckpointError
from mpillm.models.layers.stored.stored_codes import StoredFormat
from mpillm.weights.packed.packed_format import CODES, SCALE, SHAPE, ZERO, unpacked
from mpillm.weights.safetensors_source import SafetensorsSource
from mpillm.weights.slices import Box, whole_box
from mpillm.weights.tensor_source import TensorInfo, TensorSource


class PackedSource(TensorSource):
    """The tensors of `source`; a packed layer is its weight, read in float32."""

    kind: ClassVar[str] = "compressed-tensors"

    def __init__(self, source: SafetensorsSource, layout: StoredFormat) -> None:
        """Raises CheckpointError where the tensors of a layer do not fit each other."""
        self._source, self._layout = source, layout
        self._layers = {
            name.removesuffix(SCALE): name for name in source.tensors if name.endswith(SCALE)
        }
        tensors = {}
        for name, info in source.tensors.items():
            layer, dot, end = name.rpartition(".")
            if layer not in self._layers or dot + end not in (".weight", CODES, SCALE, SHAPE, ZERO):
                tensors[name] = info
            elif dot + end in (".weight", CODES):
                tensors[f"{layer}.weight"] = self._info(layer, info)
        super().__init__(source.path, tensors, source.facts)

    def _info(self, layer: str, codes: TensorInfo) -> TensorInfo:
        outputs, words = codes.shape if len(codes.shape) == 2 else (0, 0)
        columns = words * 32 // self._layout.bits if codes.dtype == "int32" else words
        shape = outputs, columns
        groups = self._layout.groups_of(columns)
        scales, zeros = (self._source.tensors.get(layer + end) for end in (SCALE, ZERO))
        whole = self._layout.divides(columns) and columns % 8 == 0
        fits = scales is not None and scales.shape == (outputs, groups)
        if self._layout.bits == 4 and zeros is not None:
            fits = fits and zeros.shape == (-(-outputs // 8), groups)
        if not (whole and fits):
            raise CheckpointError(
                f"{self._source.path} has {layer} with codes {list(codes.shape)} and scales "
                f"{list(scales.shape) if scales else 'not at all'}, which do not fit each other; "
                "download it again"
            )
        return TensorInfo(f"int{self._layout.bits}", shape, codes.nbytes)

    def read(self, name: str, box: Box | None = None) -> Tensor:
        layer = name.removesuffix(".weight")
        if layer not in self._layers:
            return self._source.read(name, box)
        ends = [
            end for end in (".weight", CODES, SCALE, ZERO) if layer + end in self._source.tensors
        ]
        held = {end: self._source.read(layer + end) for end in ends}
        outputs, inputs = self.tensors[name].shape
        values = unpacked(held, (outputs, inputs), self._layout)
        return values if box is None else values[box.within(whole_box(values.shape))]
