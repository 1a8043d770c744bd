"""`mpillm bench`."""

import os
from dataclasses import dataclass, replace
from typing import ClassVar

from mpillm.bench.bench_options import BenchOptions
from mpillm.system.command_line import Debug
from mpillm.verbs.job import limit_torch_threads, open_job


@dataclass(frozen=True)
class Bench(BenchOptions):
    """Measure messages, memory, arithmetic and files as OSU and nccl-tests do, and write the
    cluster profile.
    """

    example: ClassVar = (
        "mpirun -n 2 mpillm bench allreduce --sizes 64K:64M:x4 --check --plot allreduce.png"
    )

    debug: Debug = False

    def run(self) -> None:
        with open_job(self.debug) as job:
            limit_torch_threads(job.threads)
            from mpillm.bench.run import run_benchmarks

            if job.node_map.on_one_node:
                # gloo takes its network from the environment, else from the host's name.
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            options = replace(self, threads=job.threads)
            run_benchmarks(options, job.comm, job.console, dict(os.environ), node_map=job.node_map)
