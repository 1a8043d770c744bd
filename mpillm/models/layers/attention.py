"""Causal self-attention: the one entry to all attention kernels, and the layer around it.

Shapes: B sequences, T positions, C width, H heads, K heads of keys and values, D width of a head.
"""

from torch import Tensor, nn

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.cached_attention import LayerCache, attend_cached
from mpillm.models.layers.dense_attention import attend_dense
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.models.layers.norm import make_norm
from mpillm.models.layers.rotary import Rotation, rotate
from mpillm.models.layers.span_attention import attend_spans
from mpillm.models.layers.unfused_attention import attend_unfused
from mpillm.models.layers.varlen_attention import attend_varlen, takes_spans
from mpillm.models.layers.window_attention import attend_window, band_mask


def attend(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    spans: DocumentSpans | None = None,
    cache: LayerCache | None = None,
    first: int = 0,
    dropout: float = 0.0,
    keys_B: Tensor | None = None,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Attend causally; return (B, T, H, D). K divides H: heads share keys and values.

    `spans`: positions attend within their document. `cache`: the positions are those from `first`
    on, after what it holds. `keys_B`: the layer's keys of dropout masks; None outside of training.
    `window`: how many positions each attends to, itself the last; 0: all. `soft_cap`: scores become
    cap × tanh(score / cap); 0: as they are.
    """
    if cache is not None:
        assert spans is None, "a cache holds one document a row"
        return attend_cached(q_BTHD, k_BTKD, v_BTKD, cache, first, window, soft_cap)
    if soft_cap or (dropout and keys_B is not None):
        mask = _dense_mask(q_BTHD, spans, window)
        return attend_unfused(q_BTHD, k_BTKD, v_BTKD, mask, soft_cap, dropout, keys_B)
    if spans is None:
        return attend_window(q_BTHD, k_BTKD, v_BTKD, window)
    if takes_spans(q_BTHD):
        return attend_varlen(q_BTHD, k_BTKD, v_BTKD, spans, window)
    if q_BTHD.device.type == "cpu":
        return attend_spans(q_BTHD, k_BTKD, v_BTKD, spans, window)
    # A GPU in float32: one kernel over a matrix, where spans would be as many as documents.
    return attend_dense(q_BTHD, k_BTKD, v_BTKD, _dense_mask(q_BTHD, spans, window))


def _dense_mask(q_BTHD: Tensor, spans: DocumentSpans | None, window: int) -> Tensor:
    """Make the mask of documents and window, (T, T) or (B, 1, T, T): true where it attends."""
    if spans is not None and not window:
        return spans.dense_mask
    mask_TT = band_mask(q_BTHD.shape[1], 0, window, q_BTHD.device)
    return mask_TT if spans is None else mask_TT & spans.dense_mask


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023) of block number `block`."""

    def __init__(self, config: DecoderConfig, block: int = 0) -> None:
        super().__init__()
        self.by_head = -1, config.head_features
        self.dropout, self.soft_cap = config.attention_dropout, config.attention_soft_cap
        self.window = config.window if config.slides(block) else 0
        # The kernels divide scores by the root of the head's width.
        scale_width = config.query_scale_width or config.head_features
        self.query_factor = (config.head_features / scale_width) ** 0.5
        query, key_value = config.query_width, config.key_value_width
        biased = config.bias or config.qkv_bias
        self.query = nn.Linear(config.width, query, bias=biased)
        self.key = nn.Linear(config.width, key_value, bias=biased)
        self.value = nn.Linear(config.width, key_value, bias=biased)
        self.output = nn.Linear(query, config.width, bias=config.bias)
        normed = config.query_key_norm
        self.query_norm = make_norm(config, config.head_features) if normed else None
        self.key_norm = make_norm(config, config.head_features) if normed else None

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
        q_BTHD = self.query(x_BTC).unflatten(-1, self.by_head)
        k_BTKD = self.key(x_BTC).unflatten(-1, self.by_head)
        v_BTKD = self.value(x_BTC).unflatten(-1, self.by_head)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHD, k_BTKD = self.query_norm(q_BTHD), self.key_norm(k_BTKD)
        if rotation is not None:
            q_BTHD, k_BTKD = rotate(q_BTHD, rotation), rotate(k_BTKD, rotation)
        if self.query_factor != 1:
            q_BTHD = q_BTHD * self.query_factor
        scope = self.dropout, keys_B, self.window, self.soft_cap
        a_BTHD = attend(q_BTHD, k_BTKD, v_BTKD, spans, cache, first, *scope)
        y_BTC: Tensor = self.output(a_BTHD.flatten(2))
        return y_BTC
