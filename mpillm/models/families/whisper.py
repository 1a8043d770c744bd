"""Whisper (Radford et al. 2022): from the frames of a log-mel spectrogram to text."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.models.encoder_decoder import EncoderDecoderConfig
from mpillm.models.families.encoder_decoder_family import (
    BART_NAMES,
    EncoderDecoderFamily,
    bart_keys,
    bart_settings,
)
from mpillm.models.families.hub_config import HubConfig


class Whisper(EncoderDecoderFamily):
    """Pre-norm blocks with LayerNorm and exact GELU, two convolutions, and keys without a bias."""

    model_types = ("whisper",)
    architecture = "WhisperForConditionalGeneration"
    # A constant of sines and cosines.
    ignored = ("model.encoder.embed_positions.weight",)
    names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            **BART_NAMES,
            "sound.first.weight": "model.encoder.conv1.weight",
            "sound.first.bias": "model.encoder.conv1.bias",
            "sound.second.weight": "model.encoder.conv2.weight",
            "sound.second.bias": "model.encoder.conv2.bias",
            "encoder_norm.weight": "model.encoder.layer_norm.weight",
            "encoder_norm.bias": "model.encoder.layer_norm.bias",
            "embedding.weight": "model.decoder.embed_tokens.weight",
            "position.weight": "model.decoder.embed_positions.weight",
            "norm.weight": "model.decoder.layer_norm.weight",
            "norm.bias": "model.decoder.layer_norm.bias",
            "head.weight": "proj_out.weight",
        }
    )
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "vocab_size": 51865,
            "num_mel_bins": 80,
            "encoder_layers": 4,
            "encoder_attention_heads": 6,
            "decoder_layers": 4,
            "decoder_attention_heads": 6,
            "decoder_ffn_dim": 1536,
            "encoder_ffn_dim": 1536,
            "decoder_start_token_id": 50257,
            "activation_function": "gelu",
            "d_model": 384,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "scale_embedding": False,
            "max_source_positions": 1500,
            "max_target_positions": 448,
            "tie_word_embeddings": True,
        }
    )

    def settings(self, hub: HubConfig) -> dict[str, Any]:
        hub.require("scale_embedding", False)
        hub.require("activation_function", "gelu")
        return {
            **bart_settings(hub),
            "context": hub.integer("max_target_positions"),
            "source_context": hub.integer("max_source_positions"),
            "mels": hub.integer("num_mel_bins"),
            "decoder_positions": "learned",
            "sinusoid_ends": True,
            "activation": "gelu-exact",
            "key_bias": False,
        }

    def keys(self, spec: EncoderDecoderConfig) -> dict[str, Any]:
        return {
            **bart_keys(spec),
            "max_target_positions": spec.context,
            "max_source_positions": spec.source_context,
            "num_mel_bins": spec.mels or 80,
            "activation_function": "gelu",
        }
