"""Open what a verb runs in: MPI with its ranks, or one process alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpillm.launch.launchers import detect, is_one_of_several
from mpillm.system.console import Console
from mpillm.system.extras import extras_explained, installed

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.machine.node_map import NodeMap


@dataclass(frozen=True)
class Job:
    """All ranks, the console of rank 0, this rank's number of threads, and the map of nodes."""

    comm: "MPI.Intracomm"
    console: Console
    threads: int
    node_map: "NodeMap"
    """Of `comm`; asked of MPI once a job."""


@contextmanager
def open_job(debug: bool, stops_in_order: bool = False) -> Iterator[Job]:
    """Open MPI, let ranks fail together, and give each its share of the cores. Every rank calls it.

    `stops_in_order`: the verb itself handles the signals that ask a run to stop.
    """
    from mpillm.comm.failure import fail_together
    from mpillm.comm.world import open_world
    from mpillm.launch.launchers import watched
    from mpillm.launch.singleton import one_voice, refuse_before_init, refuse_lonely_ranks
    from mpillm.launch.threads import threads_per_rank
    from mpillm.machine.node_map import map_nodes
    from mpillm.system.ending_signals import interrupt_on_signals

    if not stops_in_order:
        interrupt_on_signals()
    with fail_together(None, debug=debug), one_voice(os.environ):
        comm = open_world(
            lambda library: refuse_before_init(os.environ, library),
            alone=not detect(os.environ).launcher,
        )
        from mpi4py import MPI

        refuse_lonely_ranks(os.environ, comm.size, MPI.Get_library_version())
    with fail_together(comm, debug=debug), extras_explained():
        node_map = map_nodes(comm)
        threads = threads_per_rank(comm, os.environ, node_map)
        # The tokenizers' own thread pool reads its size from the environment alone.
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        console = Console(speaks=comm.rank == 0, watched=watched(os.environ))
        yield Job(comm, console, threads, node_map)


@contextmanager
def first_process(debug: bool) -> Iterator[Console]:
    """Open a console for a verb that needs one process and no MPI.

    Under a launcher all processes but the first leave at once.
    """
    from mpillm.comm.failure import fail_together
    from mpillm.launch.launchers import watched
    from mpillm.system.ending_signals import interrupt_on_signals

    interrupt_on_signals()
    if is_one_of_several(os.environ):
        raise SystemExit(0)
    with fail_together(None, debug=debug), extras_explained():
        yield Console(watched=watched(os.environ))


def limit_torch_threads(threads: int) -> None:
    """Let torch compute with `threads` threads; do nothing where torch is not installed."""
    if installed("torch"):
        import torch

        torch.set_num_threads(threads)
