"""Compare attention by document spans with the dense mask: time, peak memory and agreement.

    python benchmarks/documents.py [--context 4096 --document 256 --dtype bfloat16 --json FILE]
    python benchmarks/documents.py --random

A forward and a backward pass of the attention of one layer, from the numbers of the documents on.
They take turns within each round; ratios are taken within a round. On a CPU the time is CPU time of
one thread, and the memory is counted by torch's profiler, allocation by allocation.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from cross_entropy import seconds_of
from torch import Tensor

from mpillm.bench.tensor_peak import peak_tensor_bytes
from mpillm.bench.timing import in_turn
from mpillm.models.layers.attention import attend
from mpillm.models.layers.dense_attention import attend_dense
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.system.malloc import keep_pages

# What the project asks for, at context 4,096 and documents of 256 tokens in float32.
LEAST_SPEEDUP, MOST_DIFFERENCE = 3.0, 1e-5


class Contestant:
    """One way to compute attention and its gradients."""

    def __init__(self, qkv: list[Tensor], grad: Tensor, document_BT: Tensor, dense: bool) -> None:
        self._qkv = [x.clone().requires_grad_() for x in qkv]
        self._grad, self._document_BT, self._dense = grad, document_BT, dense
        self.found: list[Tensor] = []

    def compute(self) -> None:
        spans = DocumentSpans(self._document_BT, self._grad.device)
        if self._dense:
            out = attend_dense(*self._qkv, spans.causal_mask)
        else:
            out = attend(*self._qkv, spans=spans)
        self.found = [out.detach(), *torch.autograd.grad(out, self._qkv, self._grad)]


def number_documents(options: argparse.Namespace) -> Tensor:
    """Number the documents of each row: of equal length, or of random ones with that mean."""
    shape = options.rows, options.context
    if not options.random:
        return (torch.arange(options.context) // options.document).expand(shape)
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(shape, generator=generator) < 1 / options.document).cumsum(1)


def make_contestants(options: argparse.Namespace) -> dict[str, Contestant]:
    generator = torch.Generator().manual_seed(1)
    counts = options.heads, options.kv_heads, options.kv_heads, options.heads
    *qkv, grad = (
        torch.randn(options.rows, options.context, count, options.width, generator=generator).to(
            options.device, getattr(torch, options.dtype)
        )
        for count in counts
    )
    documents = number_documents(options)
    return {n: Contestant(qkv, grad, documents, n == "dense") for n in ("dense", "spans")}


def measure(contestants: dict[str, Contestant], options: argparse.Namespace) -> dict[str, object]:
    """Measure both; return the figures in SI units."""
    peaks = {}
    for name, each in contestants.items():
        each.compute()
        each.found = []
        peaks[name] = peak_tensor_bytes(each.compute, options.device)
    pairs = zip(*(each.found for each in contestants.values()), strict=True)
    difference = max(float((one.double() - two.double()).abs().max()) for one, two in pairs)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(options.rounds):
        for name in in_turn(list(contestants), turn):
            seconds[name].append(seconds_of(contestants[name].compute, options.device))
    speedups = np.array(seconds["dense"]) / np.array(seconds["spans"])
    return {
        "peak_bytes": peaks,
        "seconds": seconds,
        "largest_difference": difference,
        "speedup_quartiles": np.percentile(speedups, [25, 50, 75]).tolist(),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("rounds", 7),
        ("rows", 1),
        ("context", 4096),
        ("document", 256),
        ("heads", 8),
        ("kv-heads", 8),
        ("width", 64),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--random", action="store_true", help="documents of random lengths")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    keep_pages()
    torch.set_num_threads(options.threads)
    figures = measure(make_contestants(options), options)
    print(
        f"{options.rows} row(s) of {options.context:,} tokens, documents of {options.document:,} "
        f"{'on average' if options.random else 'each'}, {options.heads} heads of {options.width}, "
        f"{options.dtype} on {options.device}, {options.rounds} rounds"
    )
    for name, seconds in figures["seconds"].items():
        low, middle, high = (1e3 * s for s in np.percentile(seconds, [25, 50, 75]))
        peak = figures["peak_bytes"][name] / 2**20
        print(f"{name} {middle:.1f} ms [{low:.1f}..{high:.1f}], peak {peak:,.0f} MiB")
    low, middle, high = figures["speedup_quartiles"]
    dense, spans = figures["peak_bytes"]["dense"], figures["peak_bytes"]["spans"]
    for reached, text in (
        (middle >= LEAST_SPEEDUP, f"speed: {middle:.1f} [{low:.1f}..{high:.1f}] × the dense one's"),
        (spans < dense, f"memory: {spans / dense:.2f} × the dense one's, less than 1"),
        (
            figures["largest_difference"] <= MOST_DIFFERENCE,
            f"largest difference: {figures['largest_difference']:.1e}, at most {MOST_DIFFERENCE}",
        ),
    ):
        print(f"{'reached' if reached else 'MISSED':8s} {text}")
    if options.json:
        options.json.write_text(json.dumps({**vars(options), **figures}, indent=1, default=str))


if __name__ == "__main__":
    main()
