"""The names and shapes of an encoder's weights, without torch."""

from mpillm.models.block_weights import Shape, block_weights, linear_weights, norm_weights
from mpillm.models.encoder import EncoderConfig

# Frames that a convolution of sound reads at once.
KERNEL = 3


def encoder_weights(config: EncoderConfig) -> dict[str, Shape]:
    """Return the shape of each weight of the whole model by its name; a tied one once."""
    found = _embeddings(config)
    for number in range(config.layers):
        block = block_weights(config, number)
        found |= {f"layers.{number}.{name}": shape for name, shape in block.items()}
    return found | _head(config)


def _embeddings(config: EncoderConfig) -> dict[str, Shape]:
    width, found = config.width, dict[str, Shape]()
    if config.image_size:
        patch = config.patch_size
        found["patches.class_token"] = (1, 1, width)
        found["patches.position"] = (1, config.context, width)
        found["patches.projection.weight"] = (width, config.channels, patch, patch)
        found["patches.projection.bias"] = (width,)
    elif config.mels:
        for name, given in (("first", config.mels), ("second", width)):
            found[f"sound.{name}.weight"] = (width, given, KERNEL)
            found[f"sound.{name}.bias"] = (width,)
    else:
        found["embedding.weight"] = (config.vocab_size, width)
    if config.positions == "learned" and not config.image_size:
        found["position.weight"] = (config.position_offset + config.context, width)
    if config.token_types:
        found["token_type.weight"] = (config.token_types, width)
    if config.embedding_norm:
        found |= norm_weights("embedding_norm", config)
    return found


def _head(config: EncoderConfig) -> dict[str, Shape]:
    width, found = config.width, dict[str, Shape]()
    if config.ends_in_norm:
        found |= norm_weights("norm", config)
    if config.head_layer != "none":
        found |= linear_weights("head_dense", width, width, config.bias)
    if config.head_layer == "norm":
        found |= norm_weights("head_norm", config)
    if config.head_rows:
        head = linear_weights("head", width, config.head_rows, config.head_bias)
        found |= {name: shape for name, shape in head.items() if name not in config.tied_weights}
    return found
