"""Tensors at rest under names: a checkpoint, a Hugging Face folder, a safetensors or a GGUF file.

Ranks read boxes of tensors on demand, so no process ever holds a whole model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mpillm.weights.slices import Box


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as it is stored."""

    dtype: str
    """torch's name of the dtype (`bfloat16`), or GGUF's of a quantised type (`Q4_1`)."""
    shape: tuple[int, ...]
    nbytes: int


class TensorSource(ABC):
    """The tensors at `path`, by name; `facts` are what the source records next to them."""

    kind: ClassVar[str]
    """What `path` is: `checkpoint`, `safetensors`, `GGUF`."""

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], facts: Mapping[str, Any]
    ) -> None:
        self.path, self.tensors, self.facts = path, tensors, facts

    @abstractmethod
    def read(self, name: str, box: Box | None = None) -> Tensor:
        """Return the elements of `box` (None: all) of a tensor; a quantised one in float32.

        Raises CheckpointError where they cannot be read.
        """

    @property
    def elements(self) -> int:
        """All elements of all tensors."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """All bytes of all tensors, as they are stored."""
        return sum(info.nbytes for info in self.tensors.values())
