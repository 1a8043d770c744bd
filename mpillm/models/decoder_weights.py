"""The names and shapes of a decoder's weights, without torch."""

from mpillm.models.decoder import DecoderConfig

Shape = tuple[int, ...]


def decoder_weights(config: DecoderConfig) -> dict[str, Shape]:
    """Return the shape of each weight of the whole model by its name; a tied one once."""
    width, biased = config.width, config.norm == "layernorm"
    embedding = (config.vocab_size, width)
    found: dict[str, Shape] = {"embedding.weight": embedding}
    if config.positions == "learned":
        found["position.weight"] = (config.context, width)
    block = _block_weights(config)
    for number in range(config.layers):
        found |= {f"layers.{number}.{name}": shape for name, shape in block.items()}
    found |= _norm("norm", width, biased)
    if not config.tied:
        found["head.weight"] = embedding
    return found


def _block_weights(config: DecoderConfig) -> dict[str, Shape]:
    width, hidden = config.width, config.hidden_width
    key_value = config.key_value_heads * config.head_width
    query = config.heads * config.head_width
    biased = config.norm == "layernorm"
    found = _norm("attention_norm", width, biased)
    found |= _linear("attention.query", width, query, config.bias)
    found |= _linear("attention.key", width, key_value, config.bias)
    found |= _linear("attention.value", width, key_value, config.bias)
    found |= _linear("attention.output", query, width, config.bias)
    found |= _norm("forward_norm", width, biased)
    if config.activation == "swiglu":
        found |= _linear("feed_forward.gate", width, hidden, config.bias)
    found |= _linear("feed_forward.up", width, hidden, config.bias)
    return found | _linear("feed_forward.down", hidden, width, config.bias)


def _linear(name: str, given: int, features: int, biased: bool) -> dict[str, Shape]:
    bias: dict[str, Shape] = {f"{name}.bias": (features,)} if biased else {}
    return {f"{name}.weight": (features, given), **bias}


def _norm(name: str, features: int, biased: bool) -> dict[str, Shape]:
    bias: dict[str, Shape] = {f"{name}.bias": (features,)} if biased else {}
    return {f"{name}.weight": (features,), **bias}
