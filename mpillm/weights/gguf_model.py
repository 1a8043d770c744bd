"""A GGUF file as the Hugging Face model that it was made of: its settings and its names.

llama.cpp's converter (convert_hf_to_gguf.py) renames tensors and turns the halves of rotary heads
into neighbours, for Llama and Mistral. Both are undone here.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from mpillm.errors import CheckpointError
from mpillm.weights.gguf_source import GgufSource
from mpillm.weights.slices import Box, whole_box
from mpillm.weights.tensor_source import TensorSource

# general.architecture → the family's model_type, and whether queries and keys are turned.
ARCHITECTURES: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {"llama": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
)
# Keys of the metadata after the architecture → of config.json.
KEYS: Mapping[str, str] = MappingProxyType(
    {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "rope.freq_base": "rope_theta",
    }
)
# Metadata that changes what the model computes, with the only value that is read here.
NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {"rope.scaling.type": ("none",), "expert_count": (0,), "attention.sliding_window": (0,)}
)
NAMES: Mapping[str, str] = MappingProxyType(
    {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)


class GgufModel(TensorSource):
    """The tensors of a GGUF file under the names of Hugging Face; `facts` are a `config.json`."""

    kind: ClassVar[str] = "GGUF"

    def __init__(self, source: GgufSource) -> None:
        """Read settings and names. Raises CheckpointError for what is not supported."""
        self._source = source
        self._names = {_renamed(name): name for name in source.tensors}
        tensors = {theirs: source.tensors[name] for theirs, name in self._names.items()}
        config, self._turned = _config(source)
        # Without a head of its own the embedding is tied.
        config["tie_word_embeddings"] = "lm_head.weight" not in tensors
        super().__init__(source.path, tensors, config)

    def read(self, name: str, box: Box | None = None) -> Tensor:
        stored = self._names[name]
        heads = 0
        if self._turned and ".self_attn.q_proj." in name:
            heads = self.facts["num_attention_heads"]
        elif self._turned and ".self_attn.k_proj." in name:
            heads = self.facts.get("num_key_value_heads") or self.facts["num_attention_heads"]
        if not heads:
            return self._source.read(stored, box)
        turned = self._source.read(stored)
        by_head = turned.view(heads, -1, 2, *turned.shape[1:])
        whole = by_head.transpose(1, 2).reshape(turned.shape)
        return whole if box is None else whole[box.within(whole_box(whole.shape))].contiguous()


def _renamed(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    number = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    if number and number[2] in NAMES:
        return f"model.layers.{number[1]}.{NAMES[number[2]]}.{kind}"
    return f"{NAMES[stem]}.{kind}" if stem in NAMES else name


def _config(source: GgufSource) -> tuple[dict[str, Any], bool]:
    facts = source.facts
    architecture = str(facts.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{source.path} is of the architecture {architecture!r}; mpillm reads GGUF files of "
            f"{', '.join(ARCHITECTURES)}: import the Hugging Face folder of the model"
        )
    model_type, turned = ARCHITECTURES[architecture]
    for key, neutral in NEUTRAL.items():
        value = facts.get(f"{architecture}.{key}", neutral[0])
        if value not in neutral:
            raise CheckpointError(
                f"{source.path}: {architecture}.{key} = {value!r} is not read from GGUF files; "
                "import the Hugging Face folder of the model"
            )
    config = {
        theirs: _number(facts[f"{architecture}.{ours}"])
        for ours, theirs in KEYS.items()
        if f"{architecture}.{ours}" in facts
    }
    _check_rotation(source, architecture, config)
    vocabulary = source.tensors.get("token_embd.weight")
    config["vocab_size"] = vocabulary.shape[0] if vocabulary else 0
    return {"model_type": model_type, **config}, turned


def _check_rotation(source: GgufSource, architecture: str, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a part of a head is rotated, and the rest is not."""
    rotated = source.facts.get(f"{architecture}.rope.dimension_count")
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


def _number(value: Any) -> Any:
    # Stored in float32: 1e-5 comes back as 9.99999975e-06.
    return float(str(np.float32(value))) if isinstance(value, float) else value
