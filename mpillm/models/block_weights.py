"""The names and shapes of a block's weights, without torch."""

from mpillm.models.block_settings import BlockSettings

Shape = tuple[int, ...]


def block_weights(config: BlockSettings, block: int = 0) -> dict[str, Shape]:
    """Return the shape of each weight of block number `block` by its name in the block."""
    width, hidden = config.width, config.hidden_width
    norms = ["attention_norm", "forward_norm"] if config.norms_input(block) else ["forward_norm"]
    if config.norm_place == "sandwich":
        norms += ["attention_output_norm", "forward_output_norm"]
    found: dict[str, Shape] = {}
    for name in norms:
        found |= norm_weights(name, config)
    found |= attention_weights("attention", config)
    if not config.experts:
        return found | _feed_forward("feed_forward", config, hidden)
    found |= linear_weights("feed_forward.router", width, config.experts, False)
    for number in range(config.experts):
        found |= _feed_forward(f"feed_forward.experts.{number}", config, hidden)
    if config.shared_hidden:
        found |= _feed_forward("feed_forward.shared", config, config.shared_hidden)
    if config.shared_gate:
        found |= linear_weights("feed_forward.shared_factor", width, 1, False)
    return found


def attention_weights(name: str, config: BlockSettings) -> dict[str, Shape]:
    """Return the weights of an attention, or a cross-attention."""
    width, query, key_value = config.width, config.query_width, config.key_value_width
    of_qkv = config.bias or config.qkv_bias
    found: dict[str, Shape] = {}
    if config.query_key_norm:
        for norm in ("query_norm", "key_norm"):
            found |= norm_weights(f"{name}.{norm}", config, config.head_features)
    found |= linear_weights(f"{name}.query", width, query, of_qkv)
    found |= linear_weights(f"{name}.key", width, key_value, of_qkv and config.key_bias)
    found |= linear_weights(f"{name}.value", width, key_value, of_qkv)
    return found | linear_weights(f"{name}.output", query, width, config.bias)


def _feed_forward(name: str, config: BlockSettings, hidden: int) -> dict[str, Shape]:
    found = linear_weights(f"{name}.up", config.width, hidden, config.bias)
    if config.gated:
        found |= linear_weights(f"{name}.gate", config.width, hidden, config.bias)
    return found | linear_weights(f"{name}.down", hidden, config.width, config.bias)


def linear_weights(name: str, given: int, features: int, biased: bool) -> dict[str, Shape]:
    """Return the weight (features, given) of a product, and its bias."""
    bias: dict[str, Shape] = {f"{name}.bias": (features,)} if biased else {}
    return {f"{name}.weight": (features, given), **bias}


def norm_weights(name: str, config: BlockSettings, features: int = 0) -> dict[str, Shape]:
    """Return the weights of a norm of `features`; 0: the width of the stream."""
    shape = (features or config.width,)
    bias: dict[str, Shape] = {f"{name}.bias": shape} if config.norm == "layernorm" else {}
    return {f"{name}.weight": shape, **bias}
