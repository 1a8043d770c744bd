"""A GGUF file as the Hugging Face model that it was made of: its settings and its names."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from mpillm.errors import CheckpointError
from mpillm.weights.gguf_architectures import ARCHITECTURES, GgufArchitecture
from mpillm.weights.gguf_source import GgufSource
from mpillm.weights.slices import Box, whole_box
from mpillm.weights.tensor_source import TensorInfo, TensorSource

# Metadata that changes what the model computes, with the only value that is read here.
NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {"rope.scaling.type": ("none",), "expert_count": (0,), "attention.sliding_window": (0,)}
)


class GgufModel(TensorSource):
    """The tensors of a GGUF file under the names of Hugging Face; `facts` are a `config.json`."""

    kind: ClassVar[str] = "GGUF"

    def __init__(self, source: GgufSource) -> None:
        """Read settings and names. Raises CheckpointError for what is not supported."""
        self._source, self._architecture = source, _architecture(source)
        self._names = {self._architecture.theirs(name): name for name in source.tensors}
        tensors = {theirs: self._info(name) for theirs, name in self._names.items()}
        vocabulary = source.tensors.get("token_embd.weight")
        config = self._architecture.config(
            source.facts,
            vocabulary.shape[0] if vocabulary and vocabulary.shape else 0,
            # Without a head of its own the embedding is tied.
            tied="lm_head.weight" not in tensors,
        )
        _check(source, self._architecture, config)
        super().__init__(source.path, tensors, config)

    def read(self, name: str, box: Box | None = None) -> Tensor:
        stored, architecture = self._names[name], self._architecture
        changed = architecture.is_transposed(stored) or architecture.is_shifted(stored)
        if not changed and not architecture.heads(stored, self.facts):
            return self._source.read(stored, box)
        whole = architecture.from_stored(stored, self._source.read(stored), self.facts)
        cut = whole if box is None else whole[box.within(whole_box(whole.shape))]
        return cut.contiguous()

    def _info(self, name: str) -> TensorInfo:
        info = self._source.tensors[name]
        if self._architecture.is_transposed(name):
            return TensorInfo(info.dtype, info.shape[::-1], info.nbytes)
        return info


def _architecture(source: GgufSource) -> GgufArchitecture:
    name = str(source.facts.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{source.path} is of the architecture {name!r}; mpillm reads GGUF files of "
            f"{', '.join(ARCHITECTURES)}: import the Hugging Face folder of the model"
        )
    return ARCHITECTURES[name]


def _check(source: GgufSource, architecture: GgufArchitecture, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for metadata that mpillm computes otherwise."""
    prefix = architecture.name
    for key, neutral in NEUTRAL.items():
        value = source.facts.get(f"{prefix}.{key}", neutral[0])
        if value not in neutral and key not in architecture.keys:
            raise CheckpointError(
                f"{source.path}: {prefix}.{key} = {value!r} is not read from GGUF files; "
                "import the Hugging Face folder of the model"
            )
    if "rope.freq_base" in architecture.keys:
        _check_rotation(source, prefix, config)


def _check_rotation(source: GgufSource, prefix: str, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a part of a head is rotated, and the rest is not."""
    rotated = source.facts.get(f"{prefix}.rope.dimension_count")
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not isinstance(rotated, int) or not isinstance(width, int) or not isinstance(heads, int):
        # config.json's own checks name what is missing.
        return
    head_width = config.get("head_dim") or width // max(1, heads)
    if rotated != head_width:
        raise CheckpointError(
            f"{source.path} rotates {rotated} of the {head_width} features of a head, and mpillm "
            "rotates all; it cannot be imported"
        )
