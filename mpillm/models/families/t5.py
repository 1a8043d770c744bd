"""T5 (Raffel et al. 2020) and its form 1.1, such as Flan-T5: relative positions, no biases."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.models.encoder_decoder import EncoderDecoderConfig
from mpillm.models.families.encoder_decoder_family import (
    EncoderDecoderFamily,
    length_keys,
    read_lengths,
)
from mpillm.models.families.family import Place
from mpillm.models.families.hub_config import MOST_LAYERS, HubConfig
from mpillm.models.spec import ModelSpec

# transformers takes the tanh form for `gated-gelu` alone.
ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {
        "relu": "relu",
        "gated-gelu": "geglu",
        "gated-silu": "swiglu",
        "gelu_new": "gelu",
        "gelu": "gelu-exact",
        "silu": "silu",
    }
)
POSITIONS = "n_positions"


class T5(EncoderDecoderFamily):
    """Pre-norm blocks with RMSNorm and scores that are not scaled."""

    model_types = ("t5",)
    architecture = "T5ForConditionalGeneration"
    prefix = ""
    # Old files have a table that nothing reads.
    ignored = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
    blocks: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"encoder": "encoder.block.", "decoder": "decoder.block."}
    )
    names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "source_embedding.weight": "shared.weight",
            "embedding.weight": "decoder.embed_tokens.weight",
            "encoder_norm.weight": "encoder.final_layer_norm.weight",
            "norm.weight": "decoder.final_layer_norm.weight",
            "head.weight": "lm_head.weight",
            "attention_norm": "layer.0.layer_norm",
            "attention.query": "layer.0.SelfAttention.q",
            "attention.key": "layer.0.SelfAttention.k",
            "attention.value": "layer.0.SelfAttention.v",
            "attention.output": "layer.0.SelfAttention.o",
            "attention.relative.table": "layer.0.SelfAttention.relative_attention_bias",
            "cross_norm": "layer.1.layer_norm",
            "cross_attention.query": "layer.1.EncDecAttention.q",
            "cross_attention.key": "layer.1.EncDecAttention.k",
            "cross_attention.value": "layer.1.EncDecAttention.v",
            "cross_attention.output": "layer.1.EncDecAttention.o",
            "encoder.forward_norm": "layer.1.layer_norm",
            "encoder.feed_forward.gate": "layer.1.DenseReluDense.wi_0",
            "encoder.feed_forward.up": "layer.1.DenseReluDense.wi",
            "encoder.feed_forward.down": "layer.1.DenseReluDense.wo",
            "decoder.forward_norm": "layer.2.layer_norm",
            "decoder.feed_forward.gate": "layer.2.DenseReluDense.wi_0",
            "decoder.feed_forward.up": "layer.2.DenseReluDense.wi",
            "decoder.feed_forward.down": "layer.2.DenseReluDense.wo",
        }
    )
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "vocab_size": 32128,
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 2048,
            "num_layers": 6,
            "num_heads": 8,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "dropout_rate": 0.1,
            "layer_norm_epsilon": 1e-6,
            "feed_forward_proj": "relu",
            "tie_word_embeddings": True,
            "decoder_start_token_id": 0,
            # It has no longest length, and this is what it was trained with.
            POSITIONS: 512,
        }
    )

    def settings(self, hub: HubConfig) -> dict[str, Any]:
        layers = hub.integer("num_layers", most=MOST_LAYERS)
        decoder = layers
        if hub.value("num_decoder_layers") is not None:
            decoder = hub.integer("num_decoder_layers", most=MOST_LAYERS)
        heads, width, head_width = (hub.integer(key) for key in ("num_heads", "d_model", "d_kv"))
        tied = hub.require("tie_word_embeddings", False, True)
        # The head of the first form is the embedding, and its inputs are scaled; 1.1 has neither.
        scaled = hub.require("scale_decoder_outputs", None, False, True)
        dropout = hub.share("dropout_rate")
        return {
            "layers": layers,
            "decoder_layers": 0 if decoder == layers else decoder,
            "width": width,
            "heads": heads,
            "head_width": 0 if head_width * heads == width else head_width,
            "hidden": hub.integer("d_ff"),
            **read_lengths(hub, POSITIONS),
            "vocab_size": hub.integer("vocab_size"),
            "relative_buckets": hub.integer("relative_attention_num_buckets"),
            "relative_distance": hub.integer("relative_attention_max_distance"),
            "query_scale_width": 1.0,
            "activation": ACTIVATIONS[hub.require("feed_forward_proj", *ACTIVATIONS)],
            "norm_epsilon": hub.number("layer_norm_epsilon"),
            "tied": tied,
            "scaled_head": tied if scaled is None else scaled,
            "dropout": dropout,
            "attention_dropout": dropout,
            "embedding_dropout": dropout,
        }

    def keys(self, spec: EncoderDecoderConfig) -> dict[str, Any]:
        theirs = {ours: name for name, ours in ACTIVATIONS.items()}
        return {
            "vocab_size": spec.vocab_size,
            "d_model": spec.width,
            "d_kv": spec.head_features,
            "d_ff": spec.hidden_width,
            "num_layers": spec.layers,
            "num_decoder_layers": spec.decoder_blocks,
            "num_heads": spec.heads,
            "relative_attention_num_buckets": spec.relative_buckets,
            "relative_attention_max_distance": spec.relative_distance,
            "dropout_rate": spec.dropout,
            "layer_norm_epsilon": spec.norm_epsilon,
            "feed_forward_proj": theirs.get(spec.activation, "relu"),
            "tie_word_embeddings": spec.tied,
            "scale_decoder_outputs": spec.scaled_head,
            **length_keys(spec, POSITIONS),
        }

    def place(self, spec: ModelSpec, name: str) -> Place:
        assert isinstance(spec, EncoderDecoderConfig)
        theirs = self.renamed(name)
        return Place(theirs.replace(".wi.", ".wi_1.") if spec.gated else theirs)

    def aliases(self, spec: ModelSpec) -> Mapping[str, str]:
        return {**super().aliases(spec), "encoder.embed_tokens.weight": "shared.weight"}
