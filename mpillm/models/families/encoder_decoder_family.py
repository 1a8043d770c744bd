"""The base of the families of encoder-decoders: two stacks, each with its names."""

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from mpillm.models.encoder_decoder import EncoderDecoderConfig
from mpillm.models.encoder_decoder_weights import encoder_decoder_weights
from mpillm.models.families.family import TableFamily
from mpillm.models.families.hub_config import MOST_LAYERS, HubConfig
from mpillm.models.spec import ModelSpec

# The names of BART's form (Lewis et al. 2020), which Marian and Whisper have.
BART_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "attention_norm": "self_attn_layer_norm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.out_proj",
        "cross_norm": "encoder_attn_layer_norm",
        "cross_attention.query": "encoder_attn.q_proj",
        "cross_attention.key": "encoder_attn.k_proj",
        "cross_attention.value": "encoder_attn.v_proj",
        "cross_attention.output": "encoder_attn.out_proj",
        "forward_norm": "final_layer_norm",
        "feed_forward.up": "fc1",
        "feed_forward.down": "fc2",
    }
)
BART_BLOCKS: Mapping[str, str] = MappingProxyType(
    {"encoder": "model.encoder.layers.", "decoder": "model.decoder.layers."}
)


class EncoderDecoderFamily(TableFamily):
    """A family of encoder-decoders."""

    stack = "encoder-decoder"
    architecture: ClassVar[str]
    """The name of transformers' class with a head of the vocabulary."""
    blocks: ClassVar[Mapping[str, str]] = BART_BLOCKS
    """Ahead of the number of a block, by its stack."""

    @abstractmethod
    def settings(self, hub: HubConfig) -> dict[str, Any]:
        """Return the arguments of EncoderDecoderConfig that `hub` means. Raises RecipeError."""

    @abstractmethod
    def keys(self, spec: EncoderDecoderConfig) -> dict[str, Any]:
        """Return the keys of `config.json` that say what `spec` is."""

    def read(self, hub: HubConfig) -> EncoderDecoderConfig:
        started = hub.value("decoder_start_token_id") is not None
        start = hub.integer("decoder_start_token_id", 0) if started else -1
        return EncoderDecoderConfig(**self.settings(hub), start_token=start)

    def written(self, spec: ModelSpec) -> dict[str, Any]:
        assert isinstance(spec, EncoderDecoderConfig)
        return {
            "architectures": [self.architecture],
            "is_encoder_decoder": True,
            "decoder_start_token_id": spec.start_token if spec.start_token >= 0 else None,
            **self.keys(spec),
        }

    def shapes(self, spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
        assert isinstance(spec, EncoderDecoderConfig)
        return encoder_decoder_weights(spec)

    def renamed(self, name: str) -> str:
        if name in self.names:
            return self.names[name]
        stack, number, within = name.split(".", 2)
        module, _, kind = within.rpartition(".")
        # A name may differ between the stacks.
        theirs = self.names.get(f"{stack}.{module}") or self.names[module]
        return f"{self.blocks[stack]}{number}.{theirs}.{kind}"

    def aliases(self, spec: ModelSpec) -> Mapping[str, str]:
        # The layers of a stack share one table of positions, which their files have once.
        return {
            self.renamed(follower): self.renamed(leader)
            for follower, leader in spec.tied_weights.items()
            if ".relative." not in follower
        }


def bart_settings(hub: HubConfig) -> dict[str, Any]:
    """Return the arguments that Marian and Whisper have in common."""
    for key in ("attention_heads", "ffn_dim"):
        hub.require(f"decoder_{key}", hub.integer(f"encoder_{key}"))
    layers = hub.integer("encoder_layers", most=MOST_LAYERS)
    decoder = hub.integer("decoder_layers", most=MOST_LAYERS)
    width, inner = hub.integer("d_model"), hub.integer("encoder_ffn_dim")
    return {
        "layers": layers,
        "decoder_layers": 0 if decoder == layers else decoder,
        "width": width,
        "heads": hub.integer("encoder_attention_heads"),
        "hidden": 0 if inner == 4 * width else inner,
        "vocab_size": hub.integer("vocab_size"),
        "norm": "layernorm",
        "positions": "sinusoidal",
        "bias": True,
        "tied": hub.require("tie_word_embeddings", True),
        "dropout": hub.share("dropout"),
        "attention_dropout": hub.share("attention_dropout"),
        "embedding_dropout": hub.share("dropout"),
    }


def bart_keys(spec: EncoderDecoderConfig) -> dict[str, Any]:
    """Return the keys that Marian and Whisper have in common."""
    return {
        "vocab_size": spec.vocab_size,
        "d_model": spec.width,
        "encoder_layers": spec.layers,
        "decoder_layers": spec.decoder_blocks,
        "encoder_attention_heads": spec.heads,
        "decoder_attention_heads": spec.heads,
        "encoder_ffn_dim": spec.hidden_width,
        "decoder_ffn_dim": spec.hidden_width,
        "dropout": spec.dropout,
        "attention_dropout": spec.attention_dropout,
        "tie_word_embeddings": spec.tied,
    }


def read_lengths(hub: HubConfig, key: str) -> dict[str, Any]:
    """Return `context` and `source_context`, for both of which their files have one key."""
    names = {"context": "max_target_positions", "source_context": "max_source_positions"}
    return {ours: hub.integer(own if hub.has(own) else key) for ours, own in names.items()}


def length_keys(spec: EncoderDecoderConfig, key: str) -> dict[str, Any]:
    """Return the key of both lengths, and keys of ours where they differ."""
    if spec.context == spec.source_context:
        return {key: spec.context}
    return {
        key: max(spec.context, spec.source_context),
        "max_target_positions": spec.context,
        "max_source_positions": spec.source_context,
    }
