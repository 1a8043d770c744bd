"""Measure what recomputing activations saves and costs: peak memory and CPU time of a step.

    python benchmarks/recompute.py [--rounds 5 --width 256 --rows 4 --choices attention,full,2]
    python benchmarks/recompute.py --json FILE

The layers are those of the middle of a decoder: a stream in, its gradient back, and no logits.
Memory is the peak of torch's allocations within a step, above weights, gradients and the stream
itself. Contestants take turns within each round; ratios to keeping everything are taken in a round.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from mpillm.bench.tensor_peak import peak_tensor_bytes
from mpillm.bench.timing import in_turn
from mpillm.models.decoder import DecoderConfig
from mpillm.models.part_module import PartModule, create
from mpillm.models.spec import Part
from mpillm.system.malloc import keep_pages

KINDS = {
    "llama": {},
    "gpt2": {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True},
}
# Issue 17: full recomputation, 12 layers, context 1,024.
LARGEST_MEMORY, LARGEST_TIME = 0.35, 1.35


def build(kind: str, options: argparse.Namespace) -> PartModule:
    """Make the layers, between an embedding and a head that are not there."""
    config = DecoderConfig(
        layers=options.layers + 2,
        width=options.width,
        heads=options.width // 32,
        context=options.context,
        vocab_size=1,
        dropout=options.dropout,
        **KINDS[kind],
    )
    return create(config, 1, part=Part(1, options.layers + 1))


def measure(kind: str, choices: list, options: argparse.Namespace) -> dict:
    """Return the peak bytes and the CPU seconds of each round, by choice."""
    part = build(kind, options)
    shape = (options.rows, options.context, options.width)
    x, gradient = torch.randn(shape), torch.randn(shape)
    fields = {"dropout_keys": torch.arange(options.rows)} if options.dropout else {}

    def step() -> None:
        given = x.detach().requires_grad_()
        part.forward_part(fields, (given,)).outputs[0].backward(gradient)

    step()  # gradients of weights are allocated here, and belong to no step
    found: dict = {choice: {"bytes": 0, "seconds": []} for choice in choices}
    for choice in choices:
        part.set_recompute(choice)
        found[choice]["bytes"] = peak_tensor_bytes(step)
    for turn in range(options.rounds):
        for choice in in_turn(choices, turn):
            part.set_recompute(choice)
            begun = time.process_time()
            step()
            found[choice]["seconds"].append(time.process_time() - begun)
    return found


def summary(kind: str, found: dict) -> list[dict]:
    """Make a row a choice, with its ratios to keeping everything."""
    base = found["none"]
    rows = []
    for choice, own in found.items():
        rounds = [a / b for a, b in zip(own["seconds"], base["seconds"], strict=True)]
        rows.append(
            {
                "model": kind,
                "recompute": choice,
                "bytes": own["bytes"],
                "memory_ratio": own["bytes"] / base["bytes"],
                "seconds": statistics.median(own["seconds"]),
                "time_ratio": statistics.median(rounds),
                "time_ratios": [min(rounds), max(rounds)],
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    print(
        f"{'model':6} {'recompute':10} {'MiB':>7} {'ratio':>6} {'CPU s':>7} {'ratio':>6}  of rounds"
    )
    for row in rows:
        low, high = row["time_ratios"]
        print(
            f"{row['model']:6} {row['recompute']!s:10} {row['bytes'] / 2**20:7,.0f} "
            f"{row['memory_ratio']:6.3f} {row['seconds']:7.2f} {row['time_ratio']:6.3f}  "
            f"{low:.2f}–{high:.2f}"
        )
        if row["recompute"] == "full":
            reached = row["memory_ratio"] <= LARGEST_MEMORY and row["time_ratio"] <= LARGEST_TIME
            print(
                f"{'reached' if reached else 'MISSED'}: full recomputation takes at most "
                f"{LARGEST_MEMORY} × the memory and {LARGEST_TIME} × the time"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("rounds", 5),
        ("layers", 12),
        ("width", 256),
        ("context", 1024),
        ("rows", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--models", default="llama,gpt2", help="of llama, gpt2, with a comma")
    parser.add_argument("--choices", default="attention,full,2", help="with commas")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    keep_pages()  # as `mpillm train` does
    torch.set_num_threads(1)
    choices = [int(word) if word.isdigit() else word for word in options.choices.split(",")]
    rows: list[dict] = []
    for kind in options.models.split(","):
        rows += summary(kind, measure(kind, ["none", *choices], options))
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
