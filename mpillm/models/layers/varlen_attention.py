"""Attention over the span of each document by torch's kernel for variable lengths, on GPUs.

Shapes: B sequences, T positions, H heads, K heads of keys and values, D width of a head.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mpillm.models.layers.document_spans import DocumentSpans

# The FlashAttention kernels compute in 16 bits, with heads of up to 256 features.
DTYPES, WIDEST_HEAD, HEAD_STEP = (torch.float16, torch.bfloat16), 256, 8


def takes_spans(q_BTHD: Tensor) -> bool:
    """Return whether the kernel exists here and takes queries such as `q_BTHD`."""
    width = q_BTHD.shape[-1]
    return (
        q_BTHD.device.type == "cuda"
        and q_BTHD.dtype in DTYPES
        and width <= WIDEST_HEAD
        and width % HEAD_STEP == 0
        and _kernel() is not None
    )


def attend_varlen(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    spans: DocumentSpans,
    window: int = 0,
    causal: bool = True,
) -> Tensor:
    """Attend within all documents by one kernel; return (B, T, H, D).

    `window`, `causal`: see attention.py.
    """
    kernel = _kernel()
    assert kernel is not None
    edges_N, longest = spans.edges_on_device, max(spans.lengths)
    a_NHD: Tensor = kernel(
        *(x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD)),
        edges_N,
        edges_N,
        longest,
        longest,
        # Positions to the left and to the right; -1: any number.
        window_size=(window - 1, 0) if causal else (window // 2 if window else -1,) * 2,
        enable_gqa=q_BTHD.shape[2] != k_BTKD.shape[2],
    )
    return a_NHD.view(q_BTHD.shape)


@cache
def _kernel() -> Callable[..., Any] | None:
    """Return torch's function; None before torch 2.11, which has none with these arguments."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa"} <= set(known) else None
