"""Compare the cross-entropy in chunks with the plain one: peak memory and time with the backward.

    python benchmarks/cross_entropy.py [--rounds 9 --tokens 4096 --dtype bfloat16 --json FILE]

Plain: all logits, then torch's cross_entropy in float32. Both compute the loss of one head and the
gradients of its weight and of the hidden states. They take turns within each round; ratios are
taken within a round. On a CPU the time is CPU time of one thread, and the memory is counted by
torch's profiler, allocation by allocation. Pages are kept, as `mpillm train` does: without that the
plain loss would also pay for faulting its logits in.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpillm.bench.tensor_peak import peak_tensor_bytes
from mpillm.bench.timing import in_turn
from mpillm.models.linear_head import LinearHead
from mpillm.system.malloc import keep_pages
from mpillm.tasks.cross_entropy import cross_entropy_sum

# What the project asks for, as shares of the plain loss's memory and time.
MOST_MEMORY, MOST_TIME = 0.15, 1.05


class Contestant:
    """One way to compute the loss of a head and its gradients."""

    def __init__(self, head: LinearHead, targets_BT: Tensor, chunked: bool) -> None:
        # Leaves of its own: gradients of the other one are not in its memory.
        self._leaves = [x.clone().requires_grad_() for x in (head.hidden_BTC, head.weight_VC)]
        self._targets_BT, self._chunked = targets_BT, chunked

    def compute(self) -> float:
        """Compute loss and gradients; return the mean loss."""
        head = LinearHead(*self._leaves)
        # The stage drops its logits once it has the loss, so no name holds them here.
        loss = cross_entropy_sum(head if self._chunked else head.logits(), self._targets_BT)
        loss = loss / self._targets_BT.numel()
        loss.backward()
        return float(loss.detach())

    def forget(self) -> list[Tensor]:
        """Return the gradients, and drop them."""
        found = [leaf.grad for leaf in self._leaves if leaf.grad is not None]
        for leaf in self._leaves:
            leaf.grad = None
        return found


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Time `work`: CPU time, or on a GPU the time until it is done."""
    if device == "cpu":
        begun = time.process_time()
        work()
        return time.process_time() - begun
    torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def make_contestants(options: argparse.Namespace) -> dict[str, Contestant]:
    generator = torch.Generator().manual_seed(1)
    dtype, device = getattr(torch, options.dtype), options.device
    hidden_BTC = torch.randn(1, options.tokens, options.width, generator=generator)
    weight_VC = 0.02 * torch.randn(options.vocabulary, options.width, generator=generator)
    targets_BT = torch.randint(options.vocabulary, (1, options.tokens), generator=generator)
    head = LinearHead(hidden_BTC.to(device, dtype), weight_VC.to(device, dtype))
    return {
        name: Contestant(head, targets_BT.to(device), chunked=name == "chunked")
        for name in ("plain", "chunked")
    }


def measure(contestants: dict[str, Contestant], options: argparse.Namespace) -> dict[str, object]:
    """Measure both; return the figures in SI units."""
    peaks, losses, gradients = {}, {}, {}
    for name, contestant in contestants.items():
        peaks[name] = peak_tensor_bytes(contestant.compute, options.device)
        contestant.forget()
        losses[name] = contestant.compute()
        gradients[name] = contestant.forget()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(options.rounds):
        for name in in_turn(list(contestants), turn):
            seconds[name].append(seconds_of(contestants[name].compute, options.device))
            contestants[name].forget()
    ratios = np.array(seconds["chunked"]) / np.array(seconds["plain"])
    return {
        "peak_bytes": peaks,
        "peak_ratio": peaks["chunked"] / peaks["plain"],
        "seconds": seconds,
        "time_ratio_quartiles": np.percentile(ratios, [25, 50, 75]).tolist(),
        "losses": losses,
        "gradient_error": [
            float((one.double() - other.double()).norm() / other.double().norm())
            for one, other in zip(gradients["chunked"], gradients["plain"], strict=True)
        ],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("rounds", 9),
        ("tokens", 4096),
        ("width", 768),
        ("vocabulary", 50257),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
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
        f"{options.tokens:,} tokens, vocabulary {options.vocabulary:,}, width {options.width:,}, "
        f"{options.dtype} on {options.device}, {options.rounds} rounds"
    )
    for name, seconds in figures["seconds"].items():
        low, middle, high = np.percentile(seconds, [25, 50, 75])
        print(
            f"{name:8s} {middle:.3f} s [{low:.3f}..{high:.3f}], "
            f"peak {figures['peak_bytes'][name] / 2**20:,.0f} MiB, "
            f"loss {figures['losses'][name]:.6f}"
        )
    low, middle, high = figures["time_ratio_quartiles"]
    errors = " and ".join(f"{error:.1e}" for error in figures["gradient_error"])
    print(f"gradients of hidden states and weight differ by {errors}")
    for what, value, most, spread in (
        ("memory", figures["peak_ratio"], MOST_MEMORY, ""),
        ("time", middle, MOST_TIME, f" [{low:.3f}..{high:.3f}]"),
    ):
        verdict = "reached" if value <= most else "MISSED"
        print(f"{verdict:8s} {what}: {value:.3f}{spread} × the plain one's, at most {most}")
    if options.json:
        options.json.write_text(json.dumps({**vars(options), **figures}, indent=1, default=str))


if __name__ == "__main__":
    main()
