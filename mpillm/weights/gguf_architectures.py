"""The architectures of GGUF files: their names of settings and tensors, and those of Hugging Face.

llama.cpp's converter (convert_hf_to_gguf.py) renames both, and for Llama turns the halves of rotary
heads into neighbours. A table here holds for both directions.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

# Keys of the metadata after the architecture → of config.json.
LLAMA_KEYS: Mapping[str, str] = MappingProxyType(
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
# Gemma 2 and 3: windows, soft caps, and norms after the products, too.
SANDWICH_KEYS: Mapping[str, str] = MappingProxyType(
    {
        **LLAMA_KEYS,
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }
)
GEMMA3_KEYS: Mapping[str, str] = MappingProxyType(
    {**SANDWICH_KEYS, "rope.freq_base_swa": "rope_local_base_freq"}
)
GPT2_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "block_count": "n_layer",
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    }
)
# Names of modules: at the ends, and in a block.
LLAMA_NAMES: Mapping[str, str] = MappingProxyType(
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
SANDWICH_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **LLAMA_NAMES,
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)
GPT2_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    }
)


@dataclass(frozen=True)
class GgufArchitecture:
    """A value of `general.architecture`, as the families of Hugging Face that it is."""

    name: str
    model_types: tuple[str, ...]
    """The families that are written so. A file is read as the first of them."""
    keys: Mapping[str, str]
    names: Mapping[str, str]
    block: str = "model.layers."
    """Ahead of the number of a block, in the names of Hugging Face."""
    turned: bool = False
    """Whether the halves of rotary heads are stored as neighbours."""
    transposed: bool = False
    """Whether Hugging Face stores a block's products as (in, out); GGUF has (out, in)."""
    shifted: bool = False
    """Whether norms are stored as 1 + weight."""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """What llama.cpp computes without a key of the metadata, as keys of config.json."""
    scaled_by_head: bool = False
    """Whether `query_pre_attn_scalar` is the width of a head, without a key."""

    def config(self, facts: Mapping[str, Any], rows: int, tied: bool) -> dict[str, Any]:
        """Return the `config.json` that the metadata mean, with `rows` of the embedding."""
        found = {
            theirs: _number(facts[f"{self.name}.{ours}"])
            for ours, theirs in self.keys.items()
            if f"{self.name}.{ours}" in facts
        }
        if self.scaled_by_head:
            found["query_pre_attn_scalar"] = found.get("head_dim")
        return {
            "model_type": self.model_types[0],
            "vocab_size": rows,
            "tie_word_embeddings": tied,
            **self.implied,
            **found,
        }

    def metadata(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metadata of a `config.json`: the inverse of `config`."""
        values = {ours: config.get(theirs) for ours, theirs in self.keys.items()}
        if "rope.freq_base" in self.keys:
            features = values["attention.key_length"] or (
                config["hidden_size"] // config["num_attention_heads"]
            )
            for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
                values[key] = features
        if values["feed_forward_length"] is None:
            # GPT-2's config.json may leave it out.
            values["feed_forward_length"] = 4 * config["n_embd"]
        values["vocab_size"] = config["vocab_size"]
        return {f"{self.name}.{key}": each for key, each in values.items() if each is not None}

    def theirs(self, name: str) -> str:
        """Return the name of Hugging Face for GGUF's; a strange name unchanged."""
        stem, _, kind = name.rpartition(".")
        number = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
        if number and number[2] in self.names:
            return f"{self.block}{number[1]}.{self.names[number[2]]}.{kind}"
        return f"{self.names[stem]}.{kind}" if stem in self.names else name

    def stored(self, name: str) -> str:
        """Return GGUF's name for a name of Hugging Face. Raises KeyError for a strange name."""
        back = {theirs: ours for ours, theirs in self.names.items()}
        stem, _, kind = name.rpartition(".")
        if stem in back:
            return f"{back[stem]}.{kind}"
        number, _, module = stem.removeprefix(self.block).partition(".")
        return f"blk.{number}.{back[module]}.{kind}"

    def is_transposed(self, name: str) -> bool:
        """Return whether a tensor, by GGUF's name, is stored as the transpose."""
        return self.transposed and name.startswith("blk.") and "norm" not in name

    def is_shifted(self, name: str) -> bool:
        """Return whether a tensor, by GGUF's name, is stored as 1 + weight."""
        return self.shifted and name.endswith("norm.weight")

    def heads(self, name: str, config: Mapping[str, Any]) -> int:
        """Return the number of rotary heads along dim 0 of a tensor, by GGUF's name; 0 for none."""
        if not self.turned or not re.search(r"\.attn_[qk]\.", name):
            return 0
        heads = int(config["num_attention_heads"])
        grouped = config.get("num_key_value_heads") or heads
        return heads if ".attn_q." in name else int(grouped)

    def to_stored(self, name: str, values: Tensor, config: Mapping[str, Any]) -> Tensor:
        """Return the values as a GGUF file has them under its own `name`."""
        if self.is_transposed(name):
            return values.t() if values.dim() == 2 else values
        if self.is_shifted(name):
            return values + 1
        return _swapped(values, heads, 2) if (heads := self.heads(name, config)) else values

    def from_stored(self, name: str, values: Tensor, config: Mapping[str, Any]) -> Tensor:
        """Return the values as Hugging Face has them: the inverse of `to_stored`."""
        if self.is_transposed(name):
            return values.t() if values.dim() == 2 else values
        if self.is_shifted(name):
            return values - 1
        if not (heads := self.heads(name, config)):
            return values
        return _swapped(values, heads, values.shape[0] // heads // 2)


def _number(value: Any) -> Any:
    # Stored in float32: 1e-5 comes back as 9.99999975e-06.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _swapped(values: Tensor, heads: int, parts: int) -> Tensor:
    """Swap the two indices of each head's features along dim 0; the first one counts `parts`."""
    by_head = values.reshape(heads, parts, -1, *values.shape[1:])
    return by_head.transpose(1, 2).reshape(values.shape)


ARCHITECTURES: Mapping[str, GgufArchitecture] = MappingProxyType(
    {
        each.name: each
        for each in (
            GgufArchitecture("llama", ("llama", "mistral"), LLAMA_KEYS, LLAMA_NAMES, turned=True),
            GgufArchitecture("qwen2", ("qwen2",), LLAMA_KEYS, LLAMA_NAMES),
            GgufArchitecture("qwen3", ("qwen3",), LLAMA_KEYS, LLAMA_NAMES),
            GgufArchitecture("gemma", ("gemma",), LLAMA_KEYS, LLAMA_NAMES, shifted=True),
            GgufArchitecture(
                "gemma2",
                ("gemma2",),
                SANDWICH_KEYS,
                SANDWICH_NAMES,
                shifted=True,
                scaled_by_head=True,
            ),
            GgufArchitecture(
                "gemma3",
                ("gemma3_text",),
                GEMMA3_KEYS,
                SANDWICH_NAMES,
                shifted=True,
                scaled_by_head=True,
            ),
            GgufArchitecture(
                "gpt2",
                ("gpt2",),
                GPT2_KEYS,
                GPT2_NAMES,
                block="transformer.h.",
                transposed=True,
                implied={"activation_function": "gelu_new"},
            ),
        )
    }
)
