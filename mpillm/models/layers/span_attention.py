"""Causal attention over the span of each document: no work and no memory between documents.

Shapes: B sequences, T positions, H heads, K heads of keys and values, D width of a head.
"""

import torch
from torch import Tensor

from mpillm.models.layers.dense_attention import attend_dense
from mpillm.models.layers.document_spans import DocumentSpans


def attend_spans(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, spans: DocumentSpans) -> Tensor:
    """Attend document by document; return (B, T, H, D).

    Equal lengths in a row are one batched call. The bits of a document do not depend on the others
    in the call.
    """
    sizes = [count * length for count, length in spans.runs]
    # Split, not sliced: the gradient of all pieces is then one concatenation.
    pieces = [torch.split(x.flatten(0, 1), sizes) for x in (q_BTHD, k_BTKD, v_BTKD)]
    found = [
        attend_dense(*(x.unflatten(0, run) for x in piece)).flatten(0, 1)
        for run, *piece in zip(spans.runs, *pieces, strict=True)
    ]
    return torch.cat(found).view(q_BTHD.shape)
