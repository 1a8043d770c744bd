"""Marian (Junczys-Dowmunt et al. 2018) as transformers has it: the OPUS translation models."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.models.encoder_decoder import EncoderDecoderConfig
from mpillm.models.families.encoder_decoder_family import (
    BART_NAMES,
    EncoderDecoderFamily,
    bart_keys,
    bart_settings,
    length_keys,
    read_lengths,
)
from mpillm.models.families.family import Place
from mpillm.models.families.hub_config import HubConfig
from mpillm.models.spec import ModelSpec

ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {
        "swish": "silu",
        "silu": "silu",
        "relu": "relu",
        "gelu": "gelu-exact",
        "gelu_new": "gelu",
    }
)
POSITIONS = "max_position_embeddings"


class Marian(EncoderDecoderFamily):
    """Post-norm blocks with LayerNorm, sinusoidal positions, and biases everywhere."""

    model_types = ("marian",)
    architecture = "MarianMTModel"
    # Constants, which some files have.
    ignored = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")
    names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            **BART_NAMES,
            "source_embedding.weight": "model.shared.weight",
            "embedding.weight": "model.decoder.embed_tokens.weight",
            "head.weight": "lm_head.weight",
            "head.bias": "final_logits_bias",
        }
    )
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "vocab_size": 58101,
            POSITIONS: 1024,
            "encoder_layers": 12,
            "encoder_ffn_dim": 4096,
            "encoder_attention_heads": 16,
            "decoder_layers": 12,
            "decoder_ffn_dim": 4096,
            "decoder_attention_heads": 16,
            "activation_function": "gelu",
            "d_model": 1024,
            "dropout": 0.1,
            "attention_dropout": 0.0,
            "decoder_start_token_id": 58100,
            "scale_embedding": False,
            "share_encoder_decoder_embeddings": True,
            "tie_word_embeddings": True,
        }
    )

    def settings(self, hub: HubConfig) -> dict[str, Any]:
        hub.require("share_encoder_decoder_embeddings", True)
        hub.require("decoder_vocab_size", None, hub.integer("vocab_size"))
        hub.require("static_position_embeddings", None, True)
        for key in ("normalize_before", "normalize_embedding", "add_final_layer_norm"):
            hub.require(key, None, False)
        return {
            **bart_settings(hub),
            **read_lengths(hub, POSITIONS),
            "norm_place": "post",
            "activation": ACTIVATIONS[hub.require("activation_function", *ACTIVATIONS)],
            "scaled_embedding": hub.require("scale_embedding", False, True),
            "head_bias": True,
        }

    def keys(self, spec: EncoderDecoderConfig) -> dict[str, Any]:
        theirs = {ours: name for name, ours in ACTIVATIONS.items()}
        return {
            **bart_keys(spec),
            **length_keys(spec, POSITIONS),
            "activation_function": theirs.get(spec.activation, "relu"),
            "scale_embedding": spec.scaled_embedding,
        }

    def place(self, spec: ModelSpec, name: str) -> Place:
        assert isinstance(spec, EncoderDecoderConfig)
        if name == "head.bias":
            # (1, V) in their files.
            return Place(self.renamed(name), ((0, 0), (1, spec.vocab_size)), squeezed=True)
        return Place(self.renamed(name))

    def aliases(self, spec: ModelSpec) -> Mapping[str, str]:
        encoder = {"model.encoder.embed_tokens.weight": "model.shared.weight"}
        return {**super().aliases(spec), **encoder}
