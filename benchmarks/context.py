"""Compare ranks that share the positions of a sequence with one rank that has all of them.

    mpirun -n 2 python benchmarks/context.py [--context 4096,8192 --kinds ring,ulysses --rounds 9]
    sh tests/fixtures/two_hosts.sh python benchmarks/context.py --context 8192

Two pieces of work, each forward and backward in float32: the attention of one layer, and a training
step of a small decoder with the sum of its gradients. Each rank also computes the whole alone. Both
take turns within each round. Efficiency is the whole's time over the number of ranks, over the time
of the slowest rank. Memory is that of tensors of a forward and a backward pass, as torch counts
them, without the rows in shared memory.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI

from mpillm.bench.tensor_peak import peak_tensor_bytes
from mpillm.bench.timing import Call, interleave
from mpillm.comm.mesh import Mesh
from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.attention import attend
from mpillm.parallel.context.head_exchange import HeadExchange
from mpillm.parallel.context.ring_attention import Ring
from mpillm.parallel.context.zigzag import own_positions
from mpillm.parallel.pipeline.stage import Batch
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.parallel.step_plan import plan_step
from mpillm.system.malloc import keep_pages
from mpillm.tasks.causal_lm import CausalLM

WHOLE, FLOAT32_BYTES = "whole", 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("rounds", 9),
        ("heads", 8),
        ("kv-heads", 8),
        ("width", 512),
        ("layers", 2),
        ("vocab", 4096),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--context", default="4096,8192", help="lengths, with commas")
    parser.add_argument("--kinds", default="ring,ulysses", help="with commas")
    parser.add_argument("--json", type=Path, help="write the results into this file")
    return parser.parse_args()


def config_of(options: argparse.Namespace, length: int) -> DecoderConfig:
    return DecoderConfig(
        layers=options.layers,
        width=options.width,
        heads=options.heads,
        kv_heads=options.kv_heads,
        context=length,
        vocab_size=options.vocab,
    )


def attentions(
    options: argparse.Namespace, length: int, mesh: Mesh
) -> tuple[dict[str, Call], list[Ring | HeadExchange]]:
    """Return the attention of one layer, whole and of each kind, and what to close."""
    axis, generator = mesh.axis("context"), torch.Generator().manual_seed(1)
    counts = options.heads, options.kv_heads, options.kv_heads, options.heads
    width = options.width // options.heads
    whole = [torch.randn(1, length, count, width, generator=generator) for count in counts]
    places = torch.from_numpy(own_positions(axis.rank, axis.size, length))
    own = [x[:, places] for x in whole]

    def computing(kernel, given) -> Call:
        *qkv, grad = (x.clone() for x in given)
        for x in qkv:
            x.requires_grad_()
        return lambda: torch.autograd.grad(kernel(*qkv), qkv, grad)

    calls, made = {WHOLE: computing(attend, whole)}, []
    for kind in options.kinds.split(","):
        numbers = 2 * own[1].numel()
        made.append(Ring(axis, numbers, FLOAT32_BYTES) if kind == "ring" else HeadExchange(axis))
        calls[kind] = computing(made[-1].attend, own)
    return calls, made


def steps(
    options: argparse.Namespace, length: int, comm: MPI.Intracomm
) -> tuple[dict[str, Call], list[ShardedModel], list[Mesh]]:
    """Return a training step without its update, whole and of each kind, and what to close."""
    config, generator = config_of(options, length), torch.Generator().manual_seed(1)
    ids = torch.randint(options.vocab, (1, length + 1), generator=generator)
    calls, models, meshes = {}, [], []
    for kind in (WHOLE, *options.kinds.split(",")):
        alone = kind == WHOLE
        sizes = {"data": 1, "pipeline": 1} | ({} if alone else {"context": comm.size})
        mesh = Mesh(MPI.COMM_SELF if alone else comm, sizes)
        given = {} if alone else {"context": comm.size, "context_kind": kind}
        settings = ParallelSettings(**given)
        plan = plan_step(config, settings, 1, 1)
        model = ShardedModel(config, CausalLM(), 1, mesh, plan, settings)
        fields = {"ids": ids[:, :-1], "targets": ids[:, 1:]}
        batch = Batch([{**model.own_positions(fields), **model.placed}], length)
        calls[kind] = lambda model=model, batch=batch: model.train(batch)
        models.append(model)
        meshes.append(mesh)
    return calls, models, meshes


def compare(calls: dict[str, Call], comm: MPI.Intracomm, rounds: int) -> list[dict[str, object]]:
    """Time the calls in turns; return a row for each but the whole."""
    # A call is prepared once; `interleave` wants what makes it.
    makes = {name: lambda call=call: call for name, call in calls.items()}
    seconds = interleave(comm, makes, rounds, 1)
    peaks = {name: max(comm.allgather(peak_tensor_bytes(call))) for name, call in calls.items()}
    rows = []
    for name in calls:
        if name == WHOLE:
            continue
        ratios = seconds[WHOLE] / comm.size / seconds[name]
        low, middle, high = np.percentile(ratios, [25, 50, 75]).tolist()
        rows.append(
            {
                "kind": name,
                "efficiency": middle,
                "quartiles": [low, high],
                "whole_ms": 1e3 * float(np.median(seconds[WHOLE])),
                "memory": peaks[name] / peaks[WHOLE],
            }
        )
    return rows


def main() -> None:
    comm, options = MPI.COMM_WORLD, arguments()
    keep_pages()  # as `mpillm train` does
    torch.set_num_threads(1)
    found = []
    for length in map(int, options.context.split(",")):
        mesh = Mesh(comm, {"context": comm.size})
        calls, made = attentions(options, length, mesh)
        found += [
            {"work": "attention", "context": length, **row}
            for row in compare(calls, comm, options.rounds)
        ]
        for each in made:
            each.close()
        calls, models, meshes = steps(options, length, comm)
        found += [
            {"work": "step", "context": length, **row}
            for row in compare(calls, comm, options.rounds)
        ]
        for each in models:
            each.close()
        for each in (mesh, *meshes):
            each.free()
    if comm.rank:
        return
    print(f"{comm.size} ranks, {options.heads} heads ({options.kv_heads} of keys and values)")
    for row in found:
        low, high = row["quartiles"]
        print(
            f"{row['work']:9s} {row['context']:7,} {row['kind']:8s} efficiency "
            f"{row['efficiency']:.3f} [{low:.3f}..{high:.3f}] of {row['whole_ms']:,.0f} ms, "
            f"tensors of a rank {row['memory']:.2f} of the whole's"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
