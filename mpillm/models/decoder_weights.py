"""The names and shapes of a decoder's weights, without torch."""

from mpillm.models.block_weights import Shape, block_weights, norm_weights
from mpillm.models.decoder import DecoderConfig


def decoder_weights(config: DecoderConfig) -> dict[str, Shape]:
    """Return the shape of each weight of the whole model by its name; a tied one once."""
    embedding = (config.vocab_size, config.width)
    found: dict[str, Shape] = {"embedding.weight": embedding}
    if config.positions == "learned":
        found["position.weight"] = (config.context, config.width)
    block = block_weights(config)
    for number in range(config.layers):
        found |= {f"layers.{number}.{name}": shape for name, shape in block.items()}
    found |= norm_weights("norm", config)
    if not config.tied:
        found["head.weight"] = embedding
    return found
