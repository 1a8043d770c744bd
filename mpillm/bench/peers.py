"""Measure torch.distributed in the same rounds: over gloo, and over NCCL on GPUs."""

import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.bench.sample_arrays import Shape, as_tensor
from mpillm.bench.timing import Call
from mpillm.comm.failure import on_root
from mpillm.errors import DataError
from mpillm.system.extras import install_command, installed

if TYPE_CHECKING:
    from mpi4py import MPI

PEERS = ("gloo", "torch-nccl")
# A rank that never comes must not block the benchmark for torch's own 30 minutes.
PEER_TIMEOUT = timedelta(seconds=60)


class Peer:
    """Hold one torch.distributed backend that spans the job."""

    def __init__(self, name: str, process_group: Any) -> None:
        self.name, self._group = name, process_group

    def prepare(self, shape: Shape, source: Any, target: Any) -> Call:
        """Make the call of a whole collective, with the copy of an out-of-place reduction.

        Raises KeyError, RuntimeError or ValueError for operations that torch.distributed lacks.
        """
        start = self._starter(shape, source, target)
        return lambda: start().wait()

    def start(self, shape: Shape, source: Any, target: Any) -> Callable[[], Any]:
        """Make a call that returns torch's handle (`wait`, `is_completed`)."""
        return self._starter(shape, source, target)

    def _starter(self, shape: Shape, source: Any, target: Any) -> Callable[[], Any]:
        import torch.distributed as dist

        own, result = as_tensor(source), as_tensor(source if shape.same_array else target)
        block = (
            own[shape.bounds[shape.rank] : shape.bounds[shape.rank + 1]] if shape.in_place else own
        )
        # Their names since torch 2.13; the older ones warn there.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        kept: dict[str, Any] = {"group": self._group, "async_op": True}
        op = (
            None
            if shape.operation in ("allgather", "broadcast", "alltoall", "barrier")
            else _reduction(shape.op)
        )
        starters: dict[str, Callable[[], Any]] = {
            "allreduce": lambda: dist.all_reduce(_copied(own, result), op, **kept),
            "reduce": lambda: dist.reduce(_copied(own, result), shape.root, op, **kept),
            "broadcast": lambda: dist.broadcast(own, shape.root, **kept),
            "reduce_scatter": lambda: scatter(block if shape.in_place else result, own, op, **kept),
            "allgather": lambda: gather(result, block, **kept),
            "alltoall": lambda: dist.all_to_all_single(result, own, **kept),
            "barrier": lambda: dist.barrier(**kept),
        }
        if shape.operation == "alltoall" and shape.in_place:
            raise ValueError("no all-to-all in place")
        return starters[shape.operation]


def _copied(own: Any, result: Any) -> Any:
    return result if result is own else result.copy_(own)


def _reduction(op: str) -> Any:
    import torch.distributed as dist

    if op == "mean":
        raise ValueError("no mean")
    return {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op]


@contextmanager
def joined(
    comm: "MPI.Intracomm", wanted: tuple[str, ...], note: Callable[[str], None], one_node: bool
) -> Iterator[dict[str, Peer]]:
    """Open the `wanted` peers that work here, by name, while the block runs. Every rank calls it.

    torch's ranks find each other by a file where all are on `one_node`, else by rank 0's host name.
    """
    if wanted and not installed("torch"):
        note(f"left out: {', '.join(wanted)}: torch is not installed ({install_command('torch')})")
        wanted = ()
    if not wanted:
        yield {}
        return
    import torch.distributed as dist

    with ExitStack() as stack:
        if reason := _missing() or _meet(comm, stack, one_node):
            note(f"left out: {', '.join(wanted)}: {reason}")
            yield {}
            return
        groups: dict[str, Any] = {"gloo": dist.group.WORLD}
        if "torch-nccl" in wanted:
            if reason := _no_nccl(comm):
                note(f"left out: torch-nccl: {reason}")
            else:
                groups["torch-nccl"] = dist.new_group(backend="nccl")
        yield {name: Peer(name, group) for name, group in groups.items() if name in wanted}
        comm.Barrier()


def _meet(comm: "MPI.Intracomm", stack: ExitStack, one_node: bool) -> str:
    """Open torch's process group over gloo for as long as `stack`.

    Gives the reason where that failed, the same on every rank, else "".
    """
    import torch.distributed as dist

    reason = ""
    try:
        store = _store(comm, stack, one_node)
        dist.init_process_group(
            "gloo", store=store, rank=comm.rank, world_size=comm.size, timeout=PEER_TIMEOUT
        )
        stack.callback(dist.destroy_process_group)
    except (RuntimeError, ValueError, DataError) as failure:
        reason = str(failure).strip().partition("\n")[0]
    reasons: list[str] = comm.allgather(reason)
    return next((text for text in reasons if text), "")


def _store(comm: "MPI.Intracomm", stack: ExitStack, one_node: bool) -> Any:
    from torch.distributed import FileStore, TCPStore  # type: ignore[attr-defined]

    if one_node:
        folder = Path(on_root(comm, lambda: tempfile.mkdtemp(prefix="mpillm-peers-")))
        if comm.rank == 0:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return FileStore(str(folder / "store"), comm.size)
    name, port = on_root(comm, lambda: (socket.gethostname(), _free_port()))
    return TCPStore(
        name, port, comm.size, comm.rank == 0, timeout=PEER_TIMEOUT, wait_for_workers=False
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _missing() -> str:
    import torch.distributed as dist

    return (
        ""
        if dist.is_available() and dist.is_gloo_available()
        else "this torch has no torch.distributed over gloo"
    )


def _no_nccl(comm: "MPI.Intracomm") -> str:
    import torch
    import torch.distributed as dist

    if not dist.is_nccl_available():
        return "this torch has no NCCL"
    return "" if torch.cuda.device_count() >= comm.size else "NCCL needs a GPU a rank"
