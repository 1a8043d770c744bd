"""ViT (Dosovitskiy et al. 2021), of images."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.models.encoder import EncoderConfig
from mpillm.models.encoder_settings import Head
from mpillm.models.families.bert import ACTIVATIONS
from mpillm.models.families.encoder_family import EncoderFamily, name_of
from mpillm.models.families.hub_config import MOST_LAYERS, HubConfig

LARGEST_IMAGE, MOST_CHANNELS = 1 << 14, 1 << 10


class ViT(EncoderFamily):
    """Pre-norm blocks with LayerNorm over patches and a class token."""

    model_types = ("vit",)
    prefix = "vit."
    # A file of a classifier may have what a bare model pools by, or a token of masked patches.
    ignored = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.mask_token")
    block = "vit.encoder.layer."
    names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "patches.class_token": "vit.embeddings.cls_token",
            "patches.position": "vit.embeddings.position_embeddings",
            "patches.projection.weight": "vit.embeddings.patch_embeddings.projection.weight",
            "patches.projection.bias": "vit.embeddings.patch_embeddings.projection.bias",
            "norm.weight": "vit.layernorm.weight",
            "norm.bias": "vit.layernorm.bias",
            "attention_norm": "layernorm_before",
            "attention.query": "attention.attention.query",
            "attention.key": "attention.attention.key",
            "attention.value": "attention.attention.value",
            "attention.output": "attention.output.dense",
            "forward_norm": "layernorm_after",
            "feed_forward.up": "intermediate.dense",
            "feed_forward.down": "output.dense",
        }
    )
    architectures: ClassVar[Mapping[str, Head]] = MappingProxyType(
        {"ViTForImageClassification": "sequence", "ViTModel": "none"}
    )
    heads: ClassVar[Mapping[Head, Mapping[str, str]]] = MappingProxyType(
        {"sequence": {"head": "classifier"}, "none": {"head_dense": "pooler.dense"}}
    )
    head_layers: ClassVar[Mapping[str, str]] = MappingProxyType({"none": "tanh"})
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "layer_norm_eps": 1e-12,
            "image_size": 224,
            "patch_size": 16,
            "num_channels": 3,
            "qkv_bias": True,
            "pooler_act": "tanh",
            "pooler_output_size": None,
            "num_labels": 2,
            "architectures": None,
            "id2label": None,
        }
    )

    def settings(self, hub: HubConfig, head: Head) -> dict[str, Any]:
        hub.require("qkv_bias", True)
        width = hub.integer("hidden_size")
        if head == "none":
            hub.require("pooler_act", "tanh")
            hub.require("pooler_output_size", None, width)
        return {
            "layers": hub.integer("num_hidden_layers", most=MOST_LAYERS),
            "width": width,
            "heads": hub.integer("num_attention_heads"),
            "hidden": hub.integer("intermediate_size"),
            "image_size": _side(hub, "image_size"),
            "patch_size": _side(hub, "patch_size"),
            "channels": hub.integer("num_channels", most=MOST_CHANNELS),
            "norm_place": "pre",
            "embedding_norm": False,
            "activation": ACTIVATIONS[hub.require("hidden_act", *ACTIVATIONS)],
            "norm_epsilon": hub.number("layer_norm_eps"),
            "dropout": hub.share("hidden_dropout_prob"),
            "embedding_dropout": hub.share("hidden_dropout_prob"),
            "attention_dropout": hub.share("attention_probs_dropout_prob"),
        }

    def keys(self, spec: EncoderConfig) -> dict[str, Any]:
        return {
            "hidden_size": spec.width,
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.heads,
            "intermediate_size": spec.hidden_width,
            "hidden_act": name_of(ACTIVATIONS, spec.activation),
            "hidden_dropout_prob": spec.dropout,
            "attention_probs_dropout_prob": spec.attention_dropout,
            "layer_norm_eps": spec.norm_epsilon,
            "image_size": spec.image_size or spec.patch_size,
            "patch_size": spec.patch_size,
            "num_channels": spec.channels,
            "qkv_bias": True,
        }


def _side(hub: HubConfig, key: str) -> int:
    """Return a height in pixels that is the width, too; a file may have both."""
    value = hub.value(key)
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value, value]
    known = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if not known or sides[0] != sides[1] or not 0 < sides[0] <= LARGEST_IMAGE:
        raise hub.fault(key, value, f"a whole number from 1 to {LARGEST_IMAGE} of pixels")
    return int(sides[0])
