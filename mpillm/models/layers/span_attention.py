"""Attention over the span of each document: no work and no memory between documents.

Shapes: B sequences, T positions, H heads, K heads of keys and values, D width of a head.
"""

import torch
from torch import Tensor

from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.models.layers.window_attention import attend_window


def attend_spans(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    spans: DocumentSpans,
    window: int = 0,
    causal: bool = True,
) -> Tensor:
    """Attend document by document; return (B, T, H, D). `window`, `causal`: see attention.py.

    Equal lengths in a row are one batched call. The bits of a document do not depend on the others
    in the call.
    """
    sizes = [count * length for count, length in spans.runs]
    # Split, not sliced: the gradient of all pieces is then one concatenation.
    pieces = [torch.split(x.flatten(0, 1), sizes) for x in (q_BTHD, k_BTKD, v_BTKD)]
    found = []
    for run, *piece in zip(spans.runs, *pieces, strict=True):
        q, k, v = (x.unflatten(0, run) for x in piece)
        found.append(attend_window(q, k, v, window, causal).flatten(0, 1))
    return torch.cat(found).view(q_BTHD.shape)
