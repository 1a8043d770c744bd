"""Causal self-attention: the one entry to all attention kernels, and the layer around it.

Shapes: B sequences, T positions, C width, H heads, K heads of keys and values, D width of a head.
"""

from torch import Tensor, nn

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.cached_attention import LayerCache, attend_cached
from mpillm.models.layers.dense_attention import attend_dense
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.models.layers.dropout import attend_with_dropout
from mpillm.models.layers.rotary import Rotation, rotate
from mpillm.models.layers.span_attention import attend_spans
from mpillm.models.layers.varlen_attention import attend_varlen, takes_spans


def attend(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    spans: DocumentSpans | None = None,
    cache: LayerCache | None = None,
    first: int = 0,
    dropout: float = 0.0,
    keys_B: Tensor | None = None,
) -> Tensor:
    """Attend causally; return (B, T, H, D). K divides H: heads share keys and values.

    `spans`: positions attend within their document. `cache`: the positions are those from `first`
    on, after what it holds. `keys_B`: the layer's keys of dropout masks; None outside of training.
    """
    if cache is not None:
        assert spans is None, "a cache holds one document a row"
        return attend_cached(q_BTHD, k_BTKD, v_BTKD, cache, first)
    if dropout and keys_B is not None:
        mask_B1TT = None if spans is None else spans.dense_mask
        q_BHTD, k_BKTD, v_BKTD = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
        a_BHTD = attend_with_dropout(q_BHTD, k_BKTD, v_BKTD, mask_B1TT, dropout, keys_B)
        return a_BHTD.transpose(1, 2)
    if spans is None:
        return attend_dense(q_BTHD, k_BTKD, v_BTKD)
    if takes_spans(q_BTHD):
        return attend_varlen(q_BTHD, k_BTKD, v_BTKD, spans)
    if q_BTHD.device.type == "cpu":
        return attend_spans(q_BTHD, k_BTKD, v_BTKD, spans)
    # A GPU in float32: one kernel over a matrix, where spans would be as many as documents.
    return attend_dense(q_BTHD, k_BTKD, v_BTKD, spans.dense_mask)


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        key_value = config.key_value_heads * config.head_width
        self.heads, self.kv_heads, self.head_width = (
            config.heads,
            config.key_value_heads,
            config.head_width,
        )
        self.dropout = config.attention_dropout
        self.query = nn.Linear(config.width, config.width, bias=config.bias)
        self.key = nn.Linear(config.width, key_value, bias=config.bias)
        self.value = nn.Linear(config.width, key_value, bias=config.bias)
        self.output = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(
        self,
        x_BTC: Tensor,
        rotation: Rotation | None,
        spans: DocumentSpans | None,
        cache: LayerCache | None,
        first: int,
        keys_B: Tensor | None = None,
    ) -> Tensor:
        """Attend from position `first`. `rotation`: of these positions. The rest: see `attend`."""
        by_head = -1, self.head_width
        q_BTHD = self.query(x_BTC).unflatten(-1, by_head)
        k_BTKD = self.key(x_BTC).unflatten(-1, by_head)
        v_BTKD = self.value(x_BTC).unflatten(-1, by_head)
        if rotation is not None:
            q_BTHD, k_BTKD = rotate(q_BTHD, rotation), rotate(k_BTKD, rotation)
        a_BTHD = attend(q_BTHD, k_BTKD, v_BTKD, spans, cache, first, self.dropout, keys_B)
        y_BTC: Tensor = self.output(a_BTHD.flatten(2))
        return y_BTC
