"""Queries, keys, values and documents for tests of attention kernels."""

import torch


def make_qkv(rows, length, heads=4, kv_heads=4, width=16, dtype=torch.float32):
    """Make q, k, v and the gradient of the output, all (B, T, H, D)."""
    generator = torch.Generator().manual_seed(7)
    counts = (heads, kv_heads, kv_heads, heads)
    q, k, v, grad = (
        torch.randn(rows, length, count, width, generator=generator).to(dtype) for count in counts
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def number_documents(*rows):
    """Number the documents of rows that are lists of lengths."""
    return torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    )


def random_lengths(length, seed):
    """Cut a row into documents of 1 to `length` / 3 positions."""
    generator, left, found = torch.Generator().manual_seed(seed), length, []
    while left:
        drawn = int(torch.randint(1, max(2, length // 3), (), generator=generator))
        found.append(min(drawn, left))
        left -= found[-1]
    return found


def compute(kernel, q, k, v, grad):
    """Return the output and the three gradients."""
    out = kernel(q, k, v)
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]
