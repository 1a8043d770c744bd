"""Compute the rows of a step on one rank: from a plan to what is wanted of each row.

Shapes: N positions of all rows, C width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mpillm.errors import UsageError
from mpillm.infer.serve.engine.row_plan import PlannedRow
from mpillm.infer.serve.engine.scheduler import Wanted
from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.paged.paged_attention import PagedCache, PagedRow, check_paged
from mpillm.models.linear_head import LinearHead
from mpillm.models.spec import ModelSpec
from mpillm.models.stacks.decoder_stack import Decoder


def check_served(spec: ModelSpec) -> DecoderConfig:
    """Return the settings of a model whose texts can be computed together. Raises UsageError."""
    if not isinstance(spec, DecoderConfig):
        raise UsageError(f"a model of the architecture {spec.architecture!r} continues no text")
    check_paged(spec)
    return spec


def page_bytes(spec: DecoderConfig, page_tokens: int, element: int) -> int:
    """Return the bytes of a page in all layers; `element`: of a number."""
    features = spec.key_value_heads * spec.head_features
    return 2 * spec.layers * page_tokens * features * element


class StepRunner:
    """A decoder with its pages."""

    def __init__(self, model: Decoder, pages: int, page_tokens: int) -> None:
        """Allocate the pages, whose memory is touched when they are written first."""
        self._model = model
        weight = next(model.parameters())
        self.device = weight.device
        blocks = range(model.config.layers)
        given = model.config, blocks, pages, page_tokens, weight.device, weight.dtype
        self._cache = PagedCache(*given)

    @torch.inference_mode()
    def run(self, rows: Sequence[PlannedRow]) -> list[Tensor | None]:
        """Compute the rows; those that decode come first.

        Returns of each row what it wants, float32: the logits (1, V) after its last position, those
        (T, V) after each, the sum (C,) of its hidden states, or None.
        """
        tokens = [token for row in rows for token in row.tokens]
        ids_N1 = torch.tensor(tokens, device=self.device)[:, None]
        self._cache.begin([PagedRow(row.first, len(row.tokens), row.pages) for row in rows])
        [head] = self._model.forward_part({"ids": ids_N1}, (), self._cache).outputs
        assert isinstance(head, LinearHead)
        places, found, start = [], [], 0
        for row in rows:
            stop = start + len(row.tokens)
            if row.wanted == Wanted.ALL_LOGITS:
                places.append(range(start, stop))
            elif row.wanted == Wanted.LAST_LOGITS:
                places.append(range(stop - 1, stop))
            else:
                places.append(range(0))
            start = stop
        kept_N = torch.tensor([place for each in places for place in each], device=self.device)
        # The logits of all positions of a prompt would be most of the work.
        hidden_N1C = head.hidden_BTC[kept_N.long()]
        logits_NV = head._replace(hidden_BTC=hidden_N1C).logits()[:, 0].float()
        first = start = 0
        for row, wanted in zip(rows, places, strict=True):
            own = logits_NV[first : first + len(wanted)] if wanted else None
            stop = start + len(row.tokens)
            if row.wanted == Wanted.STATES:
                own = head.hidden_BTC[start:stop, 0].float().sum(0)
            found.append(own)
            first, start = first + len(wanted), stop
        return found

    def end(self) -> None:
        """Do nothing: no other rank computes."""
