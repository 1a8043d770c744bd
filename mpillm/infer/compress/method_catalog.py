"""The table of compression methods; a plug-in is named as `package.module:Name`."""

from collections.abc import Mapping
from types import MappingProxyType

from mpillm.infer.compress.compression_method import CompressionMethod, CompressionOptions
from mpillm.system.plugins import load_class

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "rtn-int8": "mpillm.infer.compress.round_to_nearest:RoundToNearest8",
        "rtn-int4": "mpillm.infer.compress.round_to_nearest:RoundToNearest4",
        "gptq-int8": "mpillm.infer.compress.gptq:Gptq8",
        "gptq-int4": "mpillm.infer.compress.gptq:Gptq4",
        "awq-int4": "mpillm.infer.compress.awq:Awq",
        "smoothquant": "mpillm.infer.compress.smooth_quant:SmoothQuant",
        "magnitude": "mpillm.infer.compress.magnitude:Magnitude",
        "wanda": "mpillm.infer.compress.wanda:Wanda",
        "sparsegpt": "mpillm.infer.compress.sparse_gpt:SparseGpt",
        "heads": "mpillm.infer.compress.structured:Heads",
        "columns": "mpillm.infer.compress.structured:Columns",
    }
)


def make_method(name: str, options: CompressionOptions) -> CompressionMethod:
    """Make the method called `name`. Raises UsageError."""
    kind = load_class(name, METHODS, "compression method", CompressionMethod)
    return kind(options)
