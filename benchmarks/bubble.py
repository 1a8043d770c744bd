"""Compare the measured bubble of each schedule with the simulated one: stages sleep.

    mpirun -n 4 --map-by :OVERSUBSCRIBE python benchmarks/bubble.py [--microbatches 8 --unit-ms 20]

Sleeping stages need no core, so the figure is about the schedule and its executor, even with more
ranks than cores. F, I and W of a stage take one unit, B two; the stages of one rank share the unit.
Schedules take turns within each round. Printed for each: the makespan (median and quartiles) over
that of the simulator, which gets the measured times of the actions, because sleeps last too long.
"""

import argparse
import time
from statistics import fmean

import numpy as np
import torch
from mpi4py import MPI

from mpillm.bench.timing import in_turn
from mpillm.comm.mesh import Mesh
from mpillm.models.part_module import Streams
from mpillm.parallel.pipeline.actions import PipelineSchedule
from mpillm.parallel.pipeline.executor import Pipeline, StreamShapes
from mpillm.parallel.pipeline.schedule_catalog import SCHEDULES, make_schedule
from mpillm.parallel.pipeline.simulate import Costs, Timeline, simulate
from mpillm.system.malloc import keep_pages
from mpillm.train.trace import measured_costs

SHAPE = (1, 64, 256)


class SleepingStage:
    """A stage that sleeps instead of computing."""

    def __init__(self, stage: int, stages: int, seconds: float) -> None:
        self.seconds, self.stream = seconds, torch.zeros(SHAPE)
        # The first stage returns no gradients, the last no streams.
        self.gradients = () if stage == 0 else (self.stream,)
        self.streams = () if stage == stages - 1 else (self.stream,)

    def forward(self, microbatch: int, streams: Streams) -> Streams:
        time.sleep(self.seconds)
        return self.streams

    def backward(self, microbatch: int, gradients: Streams) -> Streams:
        time.sleep(2 * self.seconds)
        return self.gradients

    def backward_input(self, microbatch: int, gradients: Streams) -> Streams:
        time.sleep(self.seconds)
        return self.gradients

    def backward_weight(self, microbatch: int) -> None:
        time.sleep(self.seconds)


class Contestant:
    """A schedule with its sleeping stages."""

    def __init__(self, schedule: PipelineSchedule, mesh: Mesh, unit: float) -> None:
        self.schedule, self.axis = schedule, mesh.axis("pipeline")
        own = schedule.stages_of(self.axis.rank)
        self.seconds = unit / len(own)
        self.stages = {stage: SleepingStage(stage, schedule.stages, self.seconds) for stage in own}
        self.pipeline = Pipeline(self.axis, schedule, self.stages[own[0]].stream.nbytes)
        self._took: dict[tuple[int, str], list[float]] = {}

    def makespan(self) -> float:
        """Run one step; return the seconds from the first action of any rank to the last."""
        comm = self.axis.comm
        comm.Barrier()
        spans = self.pipeline.run(
            self.schedule, self.stages, StreamShapes(lambda microbatch: (SHAPE,))
        )
        for span in spans:
            self._took.setdefault((span.action.stage, span.action.kind), []).append(
                span.end - span.begin
            )
        begin = comm.allreduce(spans[0].begin, MPI.MIN)
        return float(comm.allreduce(spans[-1].end, MPI.MAX) - begin)

    def simulated(self) -> Timeline:
        """Simulate with the mean times of the actions. Every rank calls it."""
        own = {key: fmean(seconds) for key, seconds in self._took.items()}
        return simulate(
            self.schedule, measured_costs(self.schedule.stages, self.axis.comm.allgather(own))
        )

    def ideal(self) -> Timeline:
        return simulate(self.schedule, Costs.even(self.schedule.stages, *[self.seconds] * 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--unit-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    keep_pages()  # as `mpillm train` does
    comm = MPI.COMM_WORLD
    mesh = Mesh(comm, {"pipeline": comm.size})
    contestants = {
        name: Contestant(
            make_schedule(name, comm.size, options.microbatches), mesh, options.unit_ms / 1e3
        )
        for name in SCHEDULES
    }
    found: dict[str, list[float]] = {name: [] for name in SCHEDULES}
    for turn in range(options.rounds + 1):
        for name in in_turn(tuple(SCHEDULES), turn):
            seconds = contestants[name].makespan()
            if turn:
                found[name].append(seconds)
    timelines = {name: contestant.simulated() for name, contestant in contestants.items()}
    if comm.rank:
        return
    print(
        f"{comm.size} stages, {options.microbatches} microbatches, "
        f"F = I = W = {options.unit_ms:g} ms a rank"
    )
    for name, timeline in timelines.items():
        low, middle, high = np.percentile(found[name], [25, 50, 75]) / timeline.makespan
        bubble = middle * timeline.makespan / np.mean(timeline.busy) - 1
        print(
            f"{name:12s} makespan {middle * timeline.makespan * 1e3:7.1f} ms, "
            f"{middle:.3f} [{low:.3f}..{high:.3f}] of the simulated; bubble {bubble:6.1%}, "
            f"simulated {timeline.bubble:6.1%}, with even stages "
            f"{contestants[name].ideal().bubble:6.1%}"
        )
    gain = contestants["1f1b"].ideal().makespan / contestants["zb-h1"].ideal().makespan
    ratios = np.array(found["1f1b"]) / np.array(found["zb-h1"])
    print(f"zb-h1 against 1f1b: {np.median(ratios):.3f} times as fast, simulated {gain:.3f}")


if __name__ == "__main__":
    main()
