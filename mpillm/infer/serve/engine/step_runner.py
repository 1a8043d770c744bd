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
from mpillm.models.linear_head import LinearHead, Outputs
from mpillm.models.part_module import Streams
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
    """A decoder, or a part of it, with its pages."""

    def __init__(
        self, model: Decoder, pages: int, page_tokens: int, key_value_heads: int = 0
    ) -> None:
        """Allocate the pages, whose memory is touched when they are written first.

        `key_value_heads`: of this rank; 0: all.
        """
        self._model = model
        weight = next(model.parameters())
        self.device = weight.device
        blocks = [number for number, _ in model.numbered_blocks()]
        given = model.config, blocks, pages, page_tokens, weight.device, weight.dtype
        self._cache = PagedCache(*given, key_value_heads=key_value_heads)

    def run(self, rows: Sequence[PlannedRow]) -> list[Tensor | None]:
        """Compute the rows; those that decode come first.

        Returns of each row what it wants, float32: the logits (1, V) after its last position, those
        (T, V) after each, the sum (C,) of its hidden states, or None.
        """
        [head] = self.forward(rows, ())
        assert isinstance(head, LinearHead)
        return self.found(rows, head)

    def end(self) -> None:
        """Do nothing: no other rank computes."""

    @torch.inference_mode()
    def forward(self, rows: Sequence[PlannedRow], streams: Streams) -> Outputs:
        """Compute the part on the positions of all rows; `streams` (N, 1, C) of the part before."""
        tokens = [token for row in rows for token in row.tokens]
        ids_N1 = torch.tensor(tokens, device=self.device)[:, None]
        self._cache.begin([PagedRow(row.first, len(row.tokens), row.pages) for row in rows])
        return self._model.forward_part({"ids": ids_N1}, streams, self._cache).outputs

    @torch.inference_mode()
    def found(self, rows: Sequence[PlannedRow], head: LinearHead) -> list[Tensor | None]:
        """Return of each row what it wants of the model's head; see `run`."""
        places, start = [], 0
        for row in rows:
            stop = start + len(row.tokens)
            begin = {Wanted.ALL_LOGITS: start, Wanted.LAST_LOGITS: stop - 1}.get(row.wanted, stop)
            places.append(range(begin, stop))
            start = stop
        kept_N = torch.tensor([place for each in places for place in each], dtype=torch.int64)
        # The logits of all positions of a prompt would be most of the work.
        hidden_N1C = head.hidden_BTC[kept_N.to(self.device)]
        logits_NV = head._replace(hidden_BTC=hidden_N1C).logits()[:, 0].float()
        found: list[Tensor | None] = []
        first = start = 0
        for row, kept in zip(rows, places, strict=True):
            stop = start + len(row.tokens)
            if row.wanted == Wanted.STATES:
                found.append(head.hidden_BTC[start:stop, 0].float().sum(0))
            else:
                found.append(logits_NV[first : first + len(kept)] if kept else None)
            first, start = first + len(kept), stop
        return found
