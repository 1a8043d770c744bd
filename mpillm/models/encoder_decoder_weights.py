"""The names and shapes of an encoder-decoder's weights, without torch."""

from mpillm.models.block_weights import Shape, attention_weights, block_weights, norm_weights
from mpillm.models.encoder_decoder import EncoderDecoderConfig


def encoder_decoder_weights(config: EncoderDecoderConfig) -> dict[str, Shape]:
    """Return the shape of each weight of the whole model by its name; a tied one once."""
    width, pre = config.width, config.norm_place == "pre"
    embedding = (config.vocab_size, width)
    found: dict[str, Shape] = {"source_embedding.weight": embedding}
    if config.mels:
        # Two convolutions over three frames each.
        found = {
            "sound.first.weight": (width, config.mels, 3),
            "sound.first.bias": (width,),
            "sound.second.weight": (width, width, 3),
            "sound.second.bias": (width,),
            "embedding.weight": embedding,
        }
    if config.decoder_positions == "learned":
        found["position.weight"] = (config.context, width)
    cross = norm_weights("cross_norm", config) | attention_weights("cross_attention", config)
    none: dict[str, Shape] = {}
    for stack, count, more in (
        ("encoder", config.layers, none),
        ("decoder", config.decoder_blocks, cross),
    ):
        if config.positions == "relative":
            table = config.relative_buckets, config.heads
            found[f"{stack}.0.attention.relative.table.weight"] = table
        for number in range(count):
            own = block_weights(config, number) | more
            found |= {f"{stack}.{number}.{name}": shape for name, shape in own.items()}
    if pre:
        found |= norm_weights("encoder_norm", config) | norm_weights("norm", config)
    if not config.tied:
        found["head.weight"] = embedding
    if config.head_bias:
        found["head.bias"] = (config.vocab_size,)
    return found
