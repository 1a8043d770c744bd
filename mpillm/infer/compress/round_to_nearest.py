"""Round weights to the nearest code: int8 with a scale a row, int4 with a scale a group."""

from typing import ClassVar

from torch import Tensor

from mpillm.infer.compress.compression_method import CompressionMethod
from mpillm.infer.compress.input_statistics import InputStatistics
from mpillm.models.layers.stored.stored_codes import Grid, StoredCodes, StoredFormat


class RoundToNearest8(CompressionMethod):
    """int8 a row."""

    name: ClassVar[str] = "rtn-int8"

    @property
    def format(self) -> StoredFormat:
        return StoredFormat(8)

    def solve(self, weight_OI: Tensor, inputs: InputStatistics | None) -> StoredCodes:
        grid = Grid.of(weight_OI, self.format)
        return grid.store(grid.codes(weight_OI))


class RoundToNearest4(RoundToNearest8):
    """int4 in groups."""

    name: ClassVar[str] = "rtn-int4"

    @property
    def format(self) -> StoredFormat:
        return StoredFormat(4, self.options.group)
