"""Compare layouts with their peers: tokens a second of one training loop, memory of a node.

    mpirun -n 2 python benchmarks/layouts.py [--width 1024 --heads 16 --rows 1 --rounds 5]
    mpirun -n 2 python benchmarks/layouts.py --ways "none,zero 3,fsdp2 gloo" --dtype bfloat16
    mpirun -n 2 python benchmarks/layouts.py --memory "zero 3" --width 1024 --heads 16 --rows 1

- none: mpillm's loop without communication, each rank alone with its share: the upper bound
- replicated, zero 1 to 3, tensor: mpillm's loop in that layout
- fsdp2 gloo: torch's fully_shard of each layer, over gloo
- dtensor gloo: torch's tensor parallelism, over gloo

All take the same model, AdamW, clipping to a norm of 1, tokens in all, and one thread a rank. They
take turns within each round, in random order; ratios are taken in a round. `--memory`: one way
alone; the proportional set size (PSS) of all ranks together, above that of the processes before
they build a model, after some steps and with free pages returned: weights, gradients, states.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from data_parallel import join_gloo, measure, quartiles
from mpi4py import MPI

from mpillm.comm.mesh import Mesh
from mpillm.models.decoder import DecoderConfig
from mpillm.models.part_module import PartModule, create
from mpillm.parallel.pipeline.stage import Batch
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.parallel.step_plan import Precision, plan_step
from mpillm.system.malloc import keep_pages, release_pages
from mpillm.tasks.causal_lm import CausalLM
from mpillm.tasks.cross_entropy import cross_entropy_sum
from mpillm.train.optimizers.adamw import AdamWSettings

Step = Callable[[], None]
OURS = {
    "replicated": ParallelSettings(),
    "zero 1": ParallelSettings(zero=1),
    "zero 2": ParallelSettings(zero=2),
    "zero 3": ParallelSettings(zero=3),
}
ADAMW = AdamWSettings(learning_rate=3e-4)
PEERS = ("none", "fsdp2 gloo", "dtensor gloo", "replicated")
# The project's bars: way → peer → the least ratio of tokens a second.
LEAST = {
    "zero 3": {"none": 0.97, "fsdp2 gloo": 1.3, "replicated": 1.0},
    "tensor": {"none": 0.95, "dtensor gloo": 1.3},
}


@dataclass(frozen=True)
class Contest:
    """The model and the batch of all contestants."""

    spec: DecoderConfig
    rows: int
    """Sequences of a rank where ranks share the batch."""
    dtype: str
    comm: MPI.Intracomm

    def ids(self, rows: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (rows, self.spec.context + 1)
        return torch.randint(self.spec.vocab_size, shape, generator=generator)


def our_step(task: Contest, comm: MPI.Intracomm, settings: ParallelSettings) -> Step:
    """Make mpillm's loop over the ranks of `comm`, which share a batch of `rows` a rank."""
    sizes = {"data": comm.size, "pipeline": 1}
    tensor = settings.tensor
    if tensor > 1:
        sizes = {"data": comm.size // tensor, "pipeline": 1, "tensor": tensor}
    mesh, batch = Mesh(comm, sizes), task.rows * comm.size
    plan = plan_step(
        task.spec,
        settings,
        sizes["data"],
        batch,
        precision=Precision("cpu", task.dtype),
    )
    model = ShardedModel(task.spec, CausalLM(), 1, mesh, plan, settings)
    optimizer = ADAMW.build(model.stepped)
    seed = task.comm.rank if comm.size == 1 else mesh.axis("data").rank
    ids = task.ids(plan.rows, seed)
    fields = {"ids": ids[:, :-1], "targets": ids[:, 1:]}
    given = Batch([fields], float(batch * task.spec.context), batch)

    def step() -> None:
        passes = model.train(given)
        model.clip_(1.0, squares=passes.squares)
        optimizer.step()
        model.gradients.updated()

    return step


def torch_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Step:
    """Make torch's loop, with the optimizer and the clipping of ours."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": 0.1},
        {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        # Matrices and vectors apart: torch mixes no DTensors with others.
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()

    return step


def fsdp_step(task: Contest) -> Step:
    """Make torch's ZeRO-3: each layer, then the rest, is a unit of fully_shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    part, ids = create(task.spec, 1), task.ids(task.rows, task.comm.rank)
    mesh = init_device_mesh("cpu", (task.comm.size,))
    lower = torch.bfloat16 if task.dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32)
    for layer in part.layers.values():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(part, mesh=mesh, mp_policy=policy)
    targets = ids[:, 1:]

    def loss() -> torch.Tensor:
        return cross_entropy_sum(part(ids[:, :-1]), targets) / targets.numel()

    return torch_step(part, loss)


def dtensor_step(task: Contest) -> Step:
    """Make torch's tensor parallelism, with a loss over cut logits."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = init_device_mesh("cpu", (task.comm.size,))
    part = cut_by_dtensor(create(task.spec, 1), mesh)
    ids = task.ids(task.rows * task.comm.size, 0)

    def loss() -> torch.Tensor:
        (head,) = part.forward_part({"ids": ids[:, :-1]}, ()).outputs
        # The cut module, in place of the product with its weight alone.
        logits = part.head(head.hidden_BTC).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    step = torch_step(part, loss)

    def in_context() -> None:
        # Forward and backward: the loss reads cut logits.
        with loss_parallel():
            step()

    return in_context


def cut_by_dtensor(part: PartModule, mesh: "torch.distributed.DeviceMesh") -> PartModule:
    """Cut a decoder as torch's tutorial on tensor parallelism does; its stream stays whole.

    Its stream cut along T was as fast in other measurements, and mpillm's decoder reads the length
    of a sequence from the stream.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan: dict = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for number in part.layers:
        layer = f"layers.{number}"
        columns = ("attention.query", "attention.key", "attention.value")
        columns += ("feed_forward.gate", "feed_forward.up")
        plan |= {f"{layer}.{name}": ColwiseParallel() for name in columns}
        rows = ("attention.output", "feed_forward.down")
        plan |= {f"{layer}.{name}": RowwiseParallel() for name in rows}
    parallelize_module(part, mesh, plan)
    part.head.weight = part.embedding.weight
    return part


def contestants(task: Contest, ways: list[str]) -> dict[str, Step]:
    made: dict[str, Step] = {}
    for way in ways:
        if way == "none":
            made[way] = our_step(task, MPI.COMM_SELF, ParallelSettings())
        elif way == "fsdp2 gloo":
            made[way] = fsdp_step(task)
        elif way == "dtensor gloo":
            made[way] = dtensor_step(task)
        elif way == "tensor":
            settings = ParallelSettings(tensor=task.comm.size)
            made[way] = our_step(task, task.comm, settings)
        else:
            made[way] = our_step(task, task.comm, OURS[way])
    return made


def own_pss() -> int:
    """Return the proportional set size of this process, in bytes: shared pages are shared out."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def node_bytes(comm: MPI.Intracomm) -> int:
    """Return what all ranks together need, free pages returned. Every rank calls it."""
    release_pages()
    comm.Barrier()
    found = comm.allreduce(own_pss())
    comm.Barrier()
    return found


def measure_memory(task: Contest, way: str) -> dict:
    """Train some steps in one way; return the node's bytes above those before the model."""
    # The pages of kernels that the first step loads belong to no layout.
    small = task.spec.replace(width=64, heads=2, layers=1, vocab_size=512)
    our_step(replace(task, spec=small), MPI.COMM_SELF, ParallelSettings())()
    before = node_bytes(task.comm)
    (step,) = contestants(task, [way]).values()
    for _ in range(3):
        step()
    after = node_bytes(task.comm)
    count = task.spec.parameters
    return {"way": way, "ranks": task.comm.size, "bytes_a_parameter": (after - before) / count}


def summary(rates: dict[str, list[float]]) -> dict[str, dict]:
    """Summarize each way: quartiles of its speed, and of its ratios to its peers in a round."""
    peers = [peer for peer in PEERS if peer in rates]
    return {
        name: {
            "tokens_per_second": quartiles(values),
            **{
                f"to {peer}": quartiles(
                    [one / other for one, other in zip(values, rates[peer], strict=True)]
                )
                for peer in peers
                if peer != name
            },
        }
        for name, values in rates.items()
    }


def show(result: dict[str, dict]) -> None:
    for name, row in result.items():
        low, middle, high = row["tokens_per_second"]
        ratios = [
            f"{key} {q[1]:.3f} [{q[0]:.3f}..{q[2]:.3f}]" + _bar(name, key[3:], q[1])
            for key, q in row.items()
            if key.startswith("to ")
        ]
        speed = f"{middle:,.0f} [{low:,.0f}..{high:,.0f}]"
        print(f"{name:13} {speed:26} tokens/s  {'  '.join(ratios)}", flush=True)


def _bar(way: str, peer: str, found: float) -> str:
    least = LEAST.get(way, {}).get(peer)
    return "" if least is None else f" ({'reached' if found >= least else 'MISSED'} {least})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("rounds", 11),
        ("steps", 2),
        ("width", 384),
        ("heads", 8),
        ("layers", 8),
        ("vocab", 8192),
        ("rows", 4),
        ("length", 128),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    ways = ["none", "replicated", "zero 1", "zero 2", "zero 3", "fsdp2 gloo"]
    parser.add_argument(
        "--ways", default=",".join(ways), help="with commas; also: tensor, dtensor gloo"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--memory", default="", help="measure the memory of this way alone")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser.parse_args()


def main() -> None:
    comm, options = MPI.COMM_WORLD, arguments()
    torch.set_num_threads(1)
    join_gloo(comm)
    spec = DecoderConfig(
        layers=options.layers,
        width=options.width,
        heads=options.heads,
        context=options.length,
        vocab_size=options.vocab,
    )
    task = Contest(spec, options.rows, options.dtype, comm)
    if options.memory:
        found: dict = measure_memory(task, options.memory)
    else:
        keep_pages()  # as `mpillm train` does; here for the peers too
        made = contestants(task, options.ways.split(","))
        tokens = options.rows * options.length
        found = summary(measure(made, comm, options.rounds, options.steps, tokens))
    if comm.rank == 0:
        print(
            f"{comm.size} ranks, {spec.parameters:,} parameters, {options.dtype}, "
            f"{options.rows} × {options.length} tokens a rank and step"
        )
        if options.memory:
            print(f"{options.memory}: {found['bytes_a_parameter']:.2f} bytes a parameter")
        else:
            show(found)
        if options.json:
            settings = vars(options) | {"json": None}
            options.json.write_text(json.dumps({"settings": settings, "found": found}, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
