"""Compare pipelines with torch.distributed.pipelining: tokens a second of one training loop.

    mpirun -n 2 python benchmarks/pipeline.py [--microbatches 8 --rounds 9 --steps 2 --width 256]
    mpirun -n 2 python benchmarks/pipeline.py --only 'ours 1f1b'      alone: its peak memory

Both take the same untied decoder, cut into the same stages, the same microbatches,
AdamW(fused=True) and one thread a rank; torch's stages communicate by gloo. They take turns within
each round, and ratios are taken within a round. Busy time is the time of the stages' passes without
waiting; the bubble is waiting over computing.
"""

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed
from data_parallel import join_gloo, measure, quartiles
from mpi4py import MPI
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.nn import functional as F

from mpillm.comm.mesh import Mesh
from mpillm.models.decoder import DecoderConfig
from mpillm.models.linear_head import plain_outputs
from mpillm.models.part_module import PartModule, create
from mpillm.parallel.pipeline.stage import Batch
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.parallel.step_plan import StepPlan, plan_step
from mpillm.system.malloc import keep_pages
from mpillm.tasks.causal_lm import CausalLM

THEIRS = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}


class Ours:
    """mpillm's pipeline."""

    def __init__(
        self, config: DecoderConfig, mesh: Mesh, plan: StepPlan, settings: ParallelSettings, ids
    ) -> None:
        self.model = ShardedModel(config, CausalLM(), 1, mesh, plan, settings)
        self.optimizer = torch.optim.AdamW(self.model.named_weights().values(), fused=True)
        pieces = [{"ids": ids[a:b, :-1], "targets": ids[a:b, 1:]} for a, b in plan.bounds]
        self.batch = Batch(pieces, ids[:, 1:].numel())
        self.busy, self.loss = 0.0, 0.0

    def step(self) -> None:
        passes = self.model.train(self.batch)
        self.busy += sum(span.end - span.begin for span in passes.spans)
        self.loss = sum(passes.losses)
        self.optimizer.step()


class TorchPart(nn.Module):
    """A part of the decoder in the form that torch's stages take: a tensor in, a tensor out."""

    def __init__(self, part: PartModule) -> None:
        super().__init__()
        self.part = part

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        fields, streams = ({"ids": given}, ()) if self.part.begins else ({}, (given,))
        return plain_outputs(self.part.forward_part(fields, streams).outputs)[0]


class Theirs:
    """torch's pipeline."""

    def __init__(self, name: str, config: DecoderConfig, plan: StepPlan, rank: int, ids) -> None:
        schedule, device = plan.schedule, torch.device("cpu")
        self.parts = {
            stage: create(config, 1, part=plan.parts[stage]) for stage in schedule.stages_of(rank)
        }
        stages = [
            PipelineStage(TorchPart(part), stage, schedule.stages, device)
            for stage, part in self.parts.items()
        ]
        for stage in stages:
            for passes in ("forward_one_chunk", "backward_one_chunk"):
                setattr(stage, passes, self._timed(getattr(stage, passes)))
        held = stages if name == "interleaved" else stages[0]
        self.schedule = THEIRS[name](held, plan.microbatches, loss_fn=_mean_loss)
        weights = [weight for part in self.parts.values() for weight in part.parameters()]
        self.optimizer = torch.optim.AdamW(weights, fused=True)
        self.given = (
            (ids[:, :-1].contiguous(),) if any(part.begins for part in self.parts.values()) else ()
        )
        self.target = (
            ids[:, 1:].contiguous() if any(part.ends for part in self.parts.values()) else None
        )
        self.busy, self.loss = 0.0, 0.0

    def _timed(self, call: Callable) -> Callable:
        def timed(*arguments, **named):
            begun = time.perf_counter()
            result = call(*arguments, **named)
            self.busy += time.perf_counter() - begun
            return result

        return timed

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[torch.Tensor] = []
        self.schedule.step(*self.given, target=self.target, losses=losses)
        self.loss = float(torch.stack(losses).mean().detach()) if losses else 0.0
        self.optimizer.step()


def _mean_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("rounds", 9),
        ("steps", 2),
        ("width", 256),
        ("layers", 8),
        ("vocab", 4096),
        ("rows", 2),
        ("length", 256),
        ("microbatches", 8),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--schedules", default="1f1b,interleaved", help=f"with commas: {', '.join(THEIRS)}"
    )
    parser.add_argument("--only", default="", help="one contestant alone")
    parser.add_argument(
        "--handover", default="auto", help="how our streams pass: auto, shared, messages"
    )
    return parser.parse_args()


def main() -> None:
    comm, options = MPI.COMM_WORLD, arguments()
    keep_pages()  # as `mpillm train` does; here for the peer too
    torch.set_num_threads(1)
    join_gloo(comm)
    mesh = Mesh(comm, {"data": 1, "pipeline": comm.size})
    config = DecoderConfig(
        layers=options.layers,
        width=options.width,
        heads=8,
        context=options.length,
        vocab_size=options.vocab,
        tied=False,
    )
    rows = options.rows * options.microbatches
    ids = torch.randint(
        options.vocab, (rows, options.length + 1), generator=torch.Generator().manual_seed(1)
    )
    contestants: dict[str, Ours | Theirs] = {}
    for name in options.schedules.split(","):
        settings = ParallelSettings(pipeline=comm.size, schedule=name, handover=options.handover)
        plan = plan_step(config, settings, 1, rows, options.rows)
        if options.only in ("", f"torch {name}"):
            contestants[f"torch {name}"] = Theirs(name, config, plan, comm.rank, ids)
        if options.only in ("", f"ours {name}"):
            contestants[f"ours {name}"] = Ours(config, mesh, plan, settings, ids)
    before = {name: contestant.busy for name, contestant in contestants.items()}
    steps = {name: contestant.step for name, contestant in contestants.items()}
    rates = measure(steps, comm, options.rounds, options.steps, rows * options.length // comm.size)
    print_result(contestants, before, rates, comm, options, rows * options.length)
    torch.distributed.destroy_process_group()


def print_result(contestants, before, rates, comm, options, tokens) -> None:
    peak = comm.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    per_step = (options.rounds + 1) * options.steps
    busy = {
        name: comm.allreduce(contestant.busy - before[name]) / comm.size / per_step
        for name, contestant in contestants.items()
    }
    losses = {name: comm.allreduce(contestant.loss) for name, contestant in contestants.items()}
    if comm.rank:
        return
    print(
        f"{comm.size} ranks, {options.microbatches} microbatches of "
        f"{options.rows} × {options.length} tokens"
    )
    for name, found in rates.items():
        low, middle, high = quartiles(found)
        bubble = tokens / middle / busy[name] - 1
        line = (
            f"{name:17s} {middle:7,.0f} [{low:,.0f}..{high:,.0f}] tokens/s, loss {losses[name]:.5f}"
            f", busy {busy[name] * 1e3:.0f} ms a step, bubble {bubble:.1%} (with update)"
        )
        peer = f"torch {name.partition(' ')[2]}"
        if name != peer and peer in rates:
            ratios = [one / other for one, other in zip(found, rates[peer], strict=True)]
            of_medians = np.median(found) / np.median(rates[peer])
            line += f"; to torch {of_medians:.3f}, per round {quartiles(ratios)}"
        print(line, flush=True)
    if options.only:
        print(f"peak resident MiB by rank: {[round(mib) for mib in peak]}")


if __name__ == "__main__":
    main()
