"""Self-attention: the one entry to all attention kernels, and the layer around it.

Shapes: B sequences, T positions, S positions attended to, C width, H heads, K heads of keys and
values, D width of a head.
"""

from typing import NamedTuple

from torch import Tensor, nn

from mpillm.models.block_settings import BlockSettings
from mpillm.models.layers.cached_attention import LayerCache, attend_cached
from mpillm.models.layers.dense_attention import attend_dense, biased_mask
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.models.layers.norm import make_norm
from mpillm.models.layers.rotary import Rotation, rotate
from mpillm.models.layers.span_attention import attend_spans
from mpillm.models.layers.unfused_attention import attend_unfused
from mpillm.models.layers.varlen_attention import attend_varlen, takes_spans
from mpillm.models.layers.window_attention import attend_window, band_mask


class Pattern(NamedTuple):
    """What a layer's positions attend to, and how."""

    causal: bool = True
    """Whether a position attends to none after it."""
    window: int = 0
    """How many positions each attends to, itself the last; 0: all. Without `causal`, half of them
    on each side, next to itself.
    """
    soft_cap: float = 0.0
    """Scores become cap × tanh(score / cap); 0: as they are."""
    dropout: float = 0.0
    """Of the probabilities, in training."""


CAUSAL = Pattern()


def attend(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    pattern: Pattern = CAUSAL,
    spans: DocumentSpans | None = None,
    cache: LayerCache | None = None,
    first: int = 0,
    keys_B: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attend; return (B, T, H, D). K divides H: heads share keys and values.

    `spans`: positions attend within their document. `cache`: the positions are those from `first`
    on, after what it holds. `keys_B`: the layer's keys of dropout masks; None outside of training.
    `bias`: added to the scores, of any shape that broadcasts to (B, H, T, S); −∞ masks. S differs
    from T where a pattern that is not causal attends to another sequence.
    """
    causal, window, soft_cap, dropout = pattern
    if cache is not None:
        assert spans is None, "a cache holds one document a row"
        assert causal, "positions to come are in no cache"
        return attend_cached(q_BTHD, k_BSKD, v_BSKD, cache, first, window, soft_cap, bias)
    if soft_cap or (dropout and keys_B is not None):
        mask = _dense_mask(q_BTHD, pattern, spans)
        return attend_unfused(q_BTHD, k_BSKD, v_BSKD, mask, soft_cap, dropout, keys_B, bias)
    if bias is not None:
        mask = biased_mask(bias.to(q_BTHD.dtype), _dense_mask(q_BTHD, pattern, spans))
        return attend_dense(q_BTHD, k_BSKD, v_BSKD, mask)
    if spans is None:
        return attend_window(q_BTHD, k_BSKD, v_BSKD, window, causal)
    if takes_spans(q_BTHD):
        return attend_varlen(q_BTHD, k_BSKD, v_BSKD, spans, window, causal)
    if q_BTHD.device.type == "cpu":
        return attend_spans(q_BTHD, k_BSKD, v_BSKD, spans, window, causal)
    # A GPU in float32: one kernel over a matrix, where spans would be as many as documents.
    return attend_dense(q_BTHD, k_BSKD, v_BSKD, _dense_mask(q_BTHD, pattern, spans))


def _dense_mask(q_BTHD: Tensor, pattern: Pattern, spans: DocumentSpans | None) -> Tensor | None:
    """Make the mask of documents and pattern, (T, T) or (B, 1, T, T): true where it attends; None
    where all attend to all.
    """
    causal, window, *_ = pattern
    if spans is None and not causal and not window:
        return None
    if spans is not None and not window:
        return spans.causal_mask if causal else spans.mask
    band_TT = band_mask(q_BTHD.shape[1], 0, window, q_BTHD.device, causal)
    return band_TT if spans is None else band_TT & spans.mask


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) of block number `block`."""

    def __init__(self, config: BlockSettings, block: int = 0, causal: bool = True) -> None:
        super().__init__()
        self.by_head = -1, config.head_features
        window = config.window if config.slides(block) else 0
        self.pattern = Pattern(causal, window, config.attention_soft_cap, config.attention_dropout)
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
        bias: Tensor | None = None,
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
        given = self.pattern, spans, cache, first, keys_B, bias
        a_BTHD = attend(q_BTHD, k_BTKD, v_BTKD, *given)
        y_BTC: Tensor = self.output(a_BTHD.flatten(2))
        return y_BTC
