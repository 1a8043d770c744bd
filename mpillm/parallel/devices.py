"""Choose the device of each rank: a GPU of its own, or the CPU, of the same kind on all ranks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mpillm.errors import LayoutError
from mpillm.machine.node_map import NodeMap

if TYPE_CHECKING:
    from mpi4py import MPI


def choose_device(
    wanted: str,
    comm: "MPI.Intracomm",
    node_map: NodeMap,
    gpus: str = "",
    share: bool = False,
    option: str = "train.device",
) -> tuple[str, str]:
    """Return this rank's device and what to say of it.

    `wanted`: `cpu`, `cuda`, or `auto`, named `option` in messages. `gpus`: numbers of a node's GPUs
    in the order of its ranks. `share`: let ranks share a GPU. Every rank calls it; raises
    LayoutError on every rank.
    """
    if wanted == "auto":
        # Not a part of the ranks: they would wait for the slow ones in each step.
        wanted = "cuda" if all(comm.allgather(torch.cuda.is_available())) else "cpu"
    if wanted == "cpu":
        return "cpu", "cpu"
    own, fault = _own_gpu(gpus, node_map, comm.rank)
    everyone = comm.allgather((own, fault))
    if faults := [(rank, text) for rank, (_, text) in enumerate(everyone) if text]:
        rank, text = faults[0]
        raise LayoutError(f"{option} = cuda: rank {rank}: {text}")
    if not share:
        _check_shared(everyone, node_map, option)
    torch.cuda.set_device(own.number)
    names = {gpu.name for gpu, _ in everyone}
    return f"cuda:{own.number}", f"{comm.size} × {' and '.join(sorted(names))}"


def may_take_gpus(wanted: str) -> bool:
    """Return whether `choose_device` may give GPUs for `wanted`, as far as this rank sees."""
    return wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())


def own_device(name: str) -> torch.device:
    """Return the device `name` (`cpu`, `cuda`, `cuda:1`) with the number that this rank's GPU has.

    `choose_device` has made it the current one, in the calling thread alone: in a new thread a
    `cuda` without a number is GPU 0.
    """
    device = torch.device(name)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class _Gpu:
    number: int = 0
    """As this process counts them."""
    name: str = ""
    identity: str = ""
    """The same for two processes that see one GPU under two numbers."""


def _own_gpu(order: str, node_map: NodeMap, rank: int) -> tuple[_Gpu, str]:
    """Return the GPU of this rank, or why it has none."""
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return _Gpu(), (
            f"this torch {torch.__version__} is built for CPUs; install one for your GPUs "
            "(pytorch.org/get-started), or compute on the CPU"
        )
    count = torch.cuda.device_count()
    if not count:
        return _Gpu(), (
            "it sees no GPU; ask the batch system for some (with Slurm --gpus-per-node), check "
            "CUDA_VISIBLE_DEVICES, or compute on the CPU"
        )
    local = node_map.local_rank(rank)
    numbers = [int(word) for word in order.split(",")] if order else list(range(count))
    if wrong := [number for number in numbers if number >= count]:
        return _Gpu(), f"train.gpus names GPU {wrong[0]}, and it sees {count}, from 0"
    number = numbers[local % len(numbers)]
    facts = torch.cuda.get_device_properties(number)
    identity = str(getattr(facts, "uuid", "")) or f"{getattr(facts, 'pci_bus_id', number)}"
    return _Gpu(number, facts.name, identity), ""


def _check_shared(everyone: list[tuple[_Gpu, str]], node_map: NodeMap, option: str) -> None:
    """Raise LayoutError where two ranks of a node would compute on one GPU."""
    for ranks in node_map.nodes:
        users: dict[str, list[int]] = {}
        for rank in ranks:
            users.setdefault(everyone[rank][0].identity, []).append(rank)
        for shared in users.values():
            if len(shared) > 1:
                # The verbs without a recipe have no setting that allows it.
                training = option == "train.device"
                remedy = (
                    "allow it: --set train.share_gpu=true"
                    if training
                    else f"compute on the CPU: {option} cpu"
                )
                raise LayoutError(
                    f"{option} = cuda: a rank takes a GPU of its own, and {len(ranks)} ranks "
                    f"of a node have {len(users)}: ranks {shared[0]} and {shared[1]} would share "
                    f"{everyone[shared[0]][0].name} {everyone[shared[0]][0].number}; start "
                    f"{len(users)} ranks a node, ask for more GPUs, or {remedy}"
                )
