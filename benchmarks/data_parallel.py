"""Compare data-parallel training with its peers: tokens a second of one training loop.

    mpirun -n 2 python benchmarks/data_parallel.py [--rounds 11 --steps 3 --width 384 --json FILE]
    … --ways 'auto,during segmented-ring' --bucket-mib 8     some of our ways, other buckets

- none: the loop without communication, each rank alone: the upper bound
- ddp gloo: torch's DistributedDataParallel over gloo, its gradients in bucket views
- the others: mpillm's ReplicatedGradients, by algorithm and overlap

All take the same model, AdamW(fused=True), batch and one thread a rank. They take turns within each
round, in random order, so that a slow spell of the machine slows all; ratios are taken in a round.
"""

import argparse
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from mpi4py import MPI
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mpillm.bench.timing import in_turn
from mpillm.comm.mesh import Axis, Mesh
from mpillm.models.decoder import DecoderConfig
from mpillm.models.part_module import PartModule, create
from mpillm.parallel.data.replicated import ReplicatedGradients
from mpillm.parallel.settings import ParallelSettings
from mpillm.system.malloc import keep_pages
from mpillm.tasks.cross_entropy import cross_entropy_sum

OURS = {
    "auto": ParallelSettings(),
    "after shared": ParallelSettings(overlap="after", allreduce="shared"),
    "after two-level": ParallelSettings(overlap="after", allreduce="two-level"),
    "after segmented-ring": ParallelSettings(overlap="after", allreduce="segmented-ring"),
    "after mpi": ParallelSettings(overlap="after", allreduce="mpi"),
    "during segmented-ring": ParallelSettings(overlap="during", allreduce="segmented-ring"),
    "during two-level": ParallelSettings(overlap="during", allreduce="two-level"),
    "during mpi": ParallelSettings(overlap="during", allreduce="mpi"),
}
Step = Callable[[], None]


class WholeLoss(nn.Module):
    """The whole decoder with its mean loss, in the form that torch's wrappers take."""

    def __init__(self, part: PartModule) -> None:
        super().__init__()
        self.part = part

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        (head,) = self.part.forward_part({"ids": ids_BT[:, :-1]}, ()).outputs
        return cross_entropy_sum(head, ids_BT[:, 1:]) / ids_BT[:, 1:].numel()


def build_model(width: int, layers: int, vocab: int, length: int) -> nn.Module:
    spec = DecoderConfig(layers=layers, width=width, heads=8, context=length, vocab_size=vocab)
    return WholeLoss(create(spec, seed=1))


def plain_step(
    new_model: Callable[[], nn.Module], ids: torch.Tensor, wrap: Callable[[nn.Module], nn.Module]
) -> Step:
    """Make torch's own loop; `wrap` may make the model a DistributedDataParallel."""
    model = wrap(new_model())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(ids).backward()
        optimizer.step()

    return step


def our_step(
    new_model: Callable[[], nn.Module], ids: torch.Tensor, axis: Axis, settings: ParallelSettings
) -> Step:
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    gradients = ReplicatedGradients([model.parameters()], axis, settings)

    def step() -> None:
        gradients.begin()
        gradients.last_microbatch()
        (model(ids) / axis.size).backward()
        gradients.finish()
        optimizer.step()

    return step


def join_gloo(comm: MPI.Intracomm) -> None:
    """Start torch.distributed over loopback, or over the network that GLOO_SOCKET_IFNAME names."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    path = comm.bcast(tempfile.mktemp(prefix="mpillm-gloo-") if comm.rank == 0 else None)
    store = torch.distributed.FileStore(path, comm.size)
    torch.distributed.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)


def measure(
    steps: dict[str, Step], comm: MPI.Intracomm, rounds: int, repeats: int, tokens: int
) -> dict[str, list[float]]:
    """Measure tokens a second over all ranks, by step and round; a first round warms up."""
    rates: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds + 1):
        for name in in_turn(names, turn):
            comm.Barrier()
            started = time.perf_counter()
            for _ in range(repeats):
                steps[name]()
            comm.Barrier()
            seconds = comm.bcast(time.perf_counter() - started)
            if turn:
                rates[name].append(repeats * tokens * comm.size / seconds)
    return rates


def quartiles(values: list[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, [25, 50, 75])]


def summary(rates: dict[str, list[float]]) -> dict[str, dict[str, object]]:
    """Summarize each way: quartiles of its speed, and its ratios to each peer."""

    def ratio(name: str, peer: str) -> dict[str, object]:
        rounds = [one / other for one, other in zip(rates[name], rates[peer], strict=True)]
        of_medians = float(np.median(rates[name]) / np.median(rates[peer]))
        return {"of_medians": of_medians, "per_round": quartiles(rounds)}

    peers = [peer for peer in ("ddp gloo", "none") if peer in rates]
    return {
        name: {
            "tokens_per_second": quartiles(values),
            **{f"to {peer}": ratio(name, peer) for peer in peers},
        }
        for name, values in rates.items()
    }


def print_result(result: dict[str, dict[str, object]]) -> None:
    def spread(q: list[float], digits: int) -> str:
        return f"{q[1]:,.{digits}f} [{q[0]:,.{digits}f}..{q[2]:,.{digits}f}]"

    for name, row in result.items():
        ratios = "  ".join(
            f"{peer} {value['of_medians']:.3f}, per round {spread(value['per_round'], 3)}"
            for peer, value in row.items()
            if peer.startswith("to ")
        )
        print(
            f"{name:21s} {spread(row['tokens_per_second'], 0):26s} tokens/s  {ratios}", flush=True
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("rounds", 11),
        ("steps", 3),
        ("width", 384),
        ("layers", 8),
        ("vocab", 8192),
        ("rows", 4),
        ("length", 128),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--ways", default="auto,after mpi", help=f"of ours, with commas: {', '.join(OURS)}"
    )
    parser.add_argument(
        "--bucket-mib", type=int, default=0, help="the size of our buckets, where not the default's"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser.parse_args()


def ours(options: argparse.Namespace) -> dict[str, ParallelSettings]:
    chosen = {name: OURS[name] for name in options.ways.split(",") if name}
    if not options.bucket_mib:
        return chosen
    return {
        name: replace(settings, bucket_bytes=options.bucket_mib << 20)
        for name, settings in chosen.items()
    }


def main() -> None:
    comm, options = MPI.COMM_WORLD, arguments()
    keep_pages()  # as `mpillm train` does; here for the peers too
    torch.set_num_threads(1)
    join_gloo(comm)
    mesh = Mesh(comm, {"data": comm.size})
    new_model = functools.partial(
        build_model, options.width, options.layers, options.vocab, options.length
    )
    generator = torch.Generator().manual_seed(comm.rank)
    ids = torch.randint(options.vocab, (options.rows, options.length + 1), generator=generator)

    steps = {
        "none": plain_step(new_model, ids, lambda model: model),
        "ddp gloo": plain_step(
            new_model,
            ids,
            lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
        ),
        **{
            name: our_step(new_model, ids, mesh.axis("data"), settings)
            for name, settings in ours(options).items()
        },
    }
    rates = measure(steps, comm, options.rounds, options.steps, options.rows * options.length)
    if comm.rank == 0:
        result = summary(rates)
        parameters = sum(parameter.numel() for parameter in new_model().parameters())
        print(
            f"{comm.size} ranks, {parameters:,} parameters, "
            f"{options.rows} × {options.length} tokens a rank and step"
        )
        print_result(result)
        if options.json:
            options.json.write_text(
                json.dumps({"settings": vars(options) | {"json": None}, "ways": result}, indent=1)
            )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
