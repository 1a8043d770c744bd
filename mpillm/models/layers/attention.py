"""Attention: the one entry to all attention kernels, and the layers around it.

Shapes: B sequences, T positions, S positions attended to, C width, H heads, K heads of keys and
values, D width of a head.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from mpillm.models.block_settings import BlockSettings
from mpillm.models.layers.cached_attention import LayerCache, attend_cached
from mpillm.models.layers.dense_attention import attend_dense, biased_mask
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.models.layers.dropout import MaskKeys
from mpillm.models.layers.norm import make_norm
from mpillm.models.layers.paged.paged_attention import PagedLayer, attend_paged
from mpillm.models.layers.relative_bias import RelativeBias
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
    first_head: int = 0
    """The number of the first head in the whole layer: dropout depends on it."""


CAUSAL = Pattern()


def attend(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    pattern: Pattern = CAUSAL,
    spans: DocumentSpans | None = None,
    cache: LayerCache | PagedLayer | None = None,
    first: int = 0,
    keys_B: MaskKeys | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attend; return (B, T, H, D). K divides H: heads share keys and values.

    `spans`: positions attend within their document. `cache`: the positions are those from `first`
    on, after what it holds. `keys_B`: the layer's keys of dropout masks; None outside of training.
    `bias`: added to the scores, of any shape that broadcasts to (B, H, T, S); −∞ masks. S differs
    from T where a pattern that is not causal attends to another sequence.
    """
    causal, window, soft_cap, dropout, first_head = pattern
    if cache is not None:
        assert spans is None, "a cache holds one document a row"
        assert causal, "positions to come are in no cache"
        if isinstance(cache, PagedLayer):
            assert bias is None, "biases of distances are not computed in pages"
            return attend_paged(q_BTHD, k_BSKD, v_BSKD, cache, window, soft_cap)
        return attend_cached(q_BTHD, k_BSKD, v_BSKD, cache, first, window, soft_cap, bias)
    # Fused kernels give a bias no gradient.
    learns = bias is not None and bias.requires_grad
    if soft_cap or learns or (dropout and keys_B is not None):
        mask = _dense_mask(q_BTHD, pattern, spans)
        given = mask, soft_cap, dropout, keys_B, bias, first_head
        return attend_unfused(q_BTHD, k_BSKD, v_BSKD, *given)
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


Kernel = Callable[..., Tensor]
"""An attention as `attend`, with its arguments."""


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


class Projections(nn.Module):
    """The products of an attention: queries, keys and values, by heads, and the output."""

    def __init__(self, config: BlockSettings) -> None:
        super().__init__()
        self.by_head = -1, config.head_features
        # The kernels divide scores by the root of the head's width.
        scale_width = config.query_scale_width or config.head_features
        self.query_factor = (config.head_features / scale_width) ** 0.5
        query, key_value = config.query_width, config.key_value_width
        biased = config.bias or config.qkv_bias
        self.query = nn.Linear(config.width, query, bias=biased)
        self.key = nn.Linear(config.width, key_value, bias=biased and config.key_bias)
        self.value = nn.Linear(config.width, key_value, bias=biased)
        self.output = nn.Linear(query, config.width, bias=config.bias)
        normed = config.query_key_norm
        self.query_norm = make_norm(config, config.head_features) if normed else None
        self.key_norm = make_norm(config, config.head_features) if normed else None

    def queries(self, x_BTC: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Return the queries (B, T, H, D) of the stream."""
        q_BTHD: Tensor = self.query(x_BTC).unflatten(-1, self.by_head)
        if self.query_norm is not None:
            q_BTHD = self.query_norm(q_BTHD)
        if rotation is not None:
            q_BTHD = rotate(q_BTHD, rotation)
        return q_BTHD * self.query_factor if self.query_factor != 1 else q_BTHD

    def keys_values(self, x_BSC: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor]:
        """Return the keys and the values (B, S, K, D) of a stream."""
        k_BSKD: Tensor = self.key(x_BSC).unflatten(-1, self.by_head)
        v_BSKD: Tensor = self.value(x_BSC).unflatten(-1, self.by_head)
        if self.key_norm is not None:
            k_BSKD = self.key_norm(k_BSKD)
        return (k_BSKD if rotation is None else rotate(k_BSKD, rotation)), v_BSKD


class Attention(Projections):
    """Grouped-query self-attention (Ainslie et al. 2023) of block number `block`."""

    def __init__(self, config: BlockSettings, block: int = 0, causal: bool = True) -> None:
        super().__init__(config)
        window = config.window if config.slides(block) else 0
        self.pattern = Pattern(causal, window, config.attention_soft_cap, config.attention_dropout)
        self.relative = RelativeBias(config, causal) if config.positions == "relative" else None
        self.kernel: Kernel = attend
        """What attends: a layout that shares the positions among ranks puts its own here."""

    def forward(
        self,
        x_BTC: Tensor,
        rotation: Rotation | None,
        spans: DocumentSpans | None,
        cache: LayerCache | PagedLayer | None,
        first: int,
        keys_B: MaskKeys | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend from position `first`. `rotation`: of these positions. The rest: see `attend`."""
        q_BTHD = self.queries(x_BTC, rotation)
        k_BTKD, v_BTKD = self.keys_values(x_BTC, rotation)
        if self.relative is not None:
            own_HTS = self.relative(first, x_BTC.shape[1])
            bias = own_HTS if bias is None else own_HTS + bias
        given = self.pattern, spans, cache, first, keys_B, bias
        a_BTHD = self.kernel(q_BTHD, k_BTKD, v_BTKD, *given)
        y_BTC: Tensor = self.output(a_BTHD.flatten(2))
        return y_BTC


class CrossAttention(Projections):
    """Attention of a decoder's positions to all of an encoder's outputs (Vaswani et al. 2017)."""

    def __init__(self, config: BlockSettings) -> None:
        super().__init__(config)
        self.pattern = Pattern(False, 0, config.attention_soft_cap, config.attention_dropout)

    def forward(
        self,
        x_BTC: Tensor,
        memory: Tensor | tuple[Tensor, Tensor],
        keys_B: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend to `memory`: the encoder's outputs (B, S, C), or their keys and values. The rest:
        see `attend`.
        """
        k_BSKD, v_BSKD = self.keys_values(memory) if isinstance(memory, Tensor) else memory
        q_BTHD = self.queries(x_BTC)
        a_BTHD = attend(q_BTHD, k_BSKD, v_BSKD, self.pattern, keys_B=keys_B, bias=bias)
        y_BTC: Tensor = self.output(a_BTHD.flatten(2))
        return y_BTC
