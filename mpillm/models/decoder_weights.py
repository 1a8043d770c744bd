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
    width, hidden, biased = config.width, config.hidden_width, config.norm == "layernorm"
    query, key_value = config.query_width, config.key_value_width
    of_qkv = config.bias or config.qkv_bias
    norms = ["attention_norm", "forward_norm"]
    if config.norm_place == "sandwich":
        norms += ["attention_output_norm", "forward_output_norm"]
    found: dict[str, Shape] = {}
    for name in norms:
        found |= _norm(name, width, biased)
    if config.query_key_norm:
        for name in ("attention.query_norm", "attention.key_norm"):
            found |= _norm(name, config.head_features, biased)
    found |= _linear("attention.query", width, query, of_qkv)
    found |= _linear("attention.key", width, key_value, of_qkv)
    found |= _linear("attention.value", width, key_value, of_qkv)
    found |= _linear("attention.output", query, width, config.bias)
    if not config.experts:
        return found | _feed_forward("feed_forward", config, hidden)
    found |= _linear("feed_forward.router", width, config.experts, False)
    for number in range(config.experts):
        found |= _feed_forward(f"feed_forward.experts.{number}", config, hidden)
    if config.shared_hidden:
        found |= _feed_forward("feed_forward.shared", config, config.shared_hidden)
    if config.shared_gate:
        found |= _linear("feed_forward.shared_factor", width, 1, False)
    return found


def _feed_forward(name: str, config: DecoderConfig, hidden: int) -> dict[str, Shape]:
    found = _linear(f"{name}.up", config.width, hidden, config.bias)
    if config.gated:
        found |= _linear(f"{name}.gate", config.width, hidden, config.bias)
    return found | _linear(f"{name}.down", hidden, config.width, config.bias)


def _linear(name: str, given: int, features: int, biased: bool) -> dict[str, Shape]:
    bias: dict[str, Shape] = {f"{name}.bias": (features,)} if biased else {}
    return {f"{name}.weight": (features, given), **bias}


def _norm(name: str, features: int, biased: bool) -> dict[str, Shape]:
    bias: dict[str, Shape] = {f"{name}.bias": (features,)} if biased else {}
    return {f"{name}.weight": (features,), **bias}
