"""The norms by their names in the settings."""

from torch import nn

from mpillm.models.block_settings import BlockSettings
from mpillm.models.layers.rms_norm import RMSNorm, RMSNorm1p


def make_norm(config: BlockSettings, features: int = 0) -> nn.Module:
    """Make the norm that the settings name, of `features` (0: the width of the stream)."""
    features = features or config.width
    if config.norm.startswith("layernorm"):
        biased = config.norm == "layernorm"
        return nn.LayerNorm(features, eps=config.norm_epsilon, bias=biased)
    kind = RMSNorm1p if config.norm == "rmsnorm1p" else RMSNorm
    return kind(features, eps=config.norm_epsilon)
