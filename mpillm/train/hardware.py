"""Choose the device and the dtype of a run, the same on all ranks, before its first step."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mpillm.errors import LayoutError
from mpillm.machine.node_map import NodeMap
from mpillm.parallel.precision import torch_dtype
from mpillm.parallel.step_plan import ELEMENT_BYTES, Precision
from mpillm.system.console import Console

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.train.recipe import TrainSettings

# Tokens × width × width of the product that is timed: a millisecond in float32 on one core.
PRODUCT = (128, 512, 512)
REPEATS = 3
# `auto` takes a lower dtype where its product takes less than this share of float32's time. The
# rest of a step gains nothing, and conversions cost.
WORTHWHILE = {"cpu": 0.5, "cuda": 0.9}
# A dtype that is emulated can take a hundred times as long: one call is enough to see that.
HOPELESS = 40.0


@dataclass(frozen=True)
class Hardware:
    """What a run computes on, and in which dtypes."""

    device: str
    """torch's name of this rank's device: `cpu`, `cuda:0`."""
    precision: Precision
    description: str
    """For the printed plan."""


def choose_hardware(
    settings: "TrainSettings",
    recorded: Mapping[str, Any],
    comm: "MPI.Intracomm",
    node_map: NodeMap,
    console: Console,
) -> Hardware:
    """Choose as the settings say. Every rank of `comm` calls it.

    `recorded`: the settings [train] of the checkpoint from which the run continues. What was chosen
    by `auto` then stays. Raises LayoutError on every rank.
    """
    settings = _kept(settings, recorded)
    device, words = choose_device(settings, comm, node_map)
    _allow_tf32(settings.tf32)
    dtype = choose_dtype(settings.dtype, device, comm, console)
    kind = device.partition(":")[0]
    return Hardware(device, Precision(kind, dtype, settings.reduce_dtype), words)


def _kept(settings: "TrainSettings", recorded: Mapping[str, Any]) -> "TrainSettings":
    """Replace what the recipe leaves open by what the checkpoint's run had."""
    device, dtype = recorded.get("device"), recorded.get("dtype")
    if settings.device == "auto" and device in ("cpu", "cuda"):
        settings = replace(settings, device=device)
    if settings.dtype in ("default", "auto") and dtype in ELEMENT_BYTES:
        settings = replace(settings, dtype=dtype)
    return settings


# Devices ----------------------------------------------------------------------------------------


def choose_device(
    settings: "TrainSettings", comm: "MPI.Intracomm", node_map: NodeMap
) -> tuple[str, str]:
    """Return this rank's device and what to say of it. Every rank calls it; raises LayoutError."""
    wanted = settings.device
    if wanted == "auto":
        # Not a part of the ranks: they would wait for the slow ones in each step.
        wanted = "cuda" if all(comm.allgather(torch.cuda.is_available())) else "cpu"
    if wanted == "cpu":
        return "cpu", "cpu"
    own, fault = _own_gpu(settings.gpus, node_map, comm.rank)
    everyone = comm.allgather((own, fault))
    if faults := [(rank, text) for rank, (_, text) in enumerate(everyone) if text]:
        rank, text = faults[0]
        raise LayoutError(f"train.device = cuda: rank {rank}: {text}")
    if not settings.share_gpu:
        _check_shared(everyone, node_map)
    torch.cuda.set_device(own.number)
    names = {gpu.name for gpu, _ in everyone}
    return f"cuda:{own.number}", f"{comm.size} × {' and '.join(sorted(names))}"


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
            "(pytorch.org/get-started), or take train.device=cpu"
        )
    count = torch.cuda.device_count()
    if not count:
        return _Gpu(), (
            "it sees no GPU; ask the batch system for some (with Slurm --gpus-per-node), check "
            "CUDA_VISIBLE_DEVICES, or take train.device=cpu"
        )
    local = node_map.local_rank(rank)
    numbers = [int(word) for word in order.split(",")] if order else list(range(count))
    if wrong := [number for number in numbers if number >= count]:
        return _Gpu(), f"train.gpus names GPU {wrong[0]}, and it sees {count}, from 0"
    number = numbers[local % len(numbers)]
    facts = torch.cuda.get_device_properties(number)
    identity = str(getattr(facts, "uuid", "")) or f"{getattr(facts, 'pci_bus_id', number)}"
    return _Gpu(number, facts.name, identity), ""


def _check_shared(everyone: list[tuple[_Gpu, str]], node_map: NodeMap) -> None:
    """Raise LayoutError where two ranks of a node would compute on one GPU."""
    for ranks in node_map.nodes:
        users: dict[str, list[int]] = {}
        for rank in ranks:
            users.setdefault(everyone[rank][0].identity, []).append(rank)
        for shared in users.values():
            if len(shared) > 1:
                raise LayoutError(
                    f"train.device = cuda: a rank takes a GPU of its own, and {len(ranks)} ranks "
                    f"of a node have {len(users)}: ranks {shared[0]} and {shared[1]} would share "
                    f"{everyone[shared[0]][0].name} {everyone[shared[0]][0].number}; start "
                    f"{len(users)} ranks a node, ask for more GPUs, or allow it: "
                    "--set train.share_gpu=true"
                )


# Dtypes -----------------------------------------------------------------------------------------


def _allow_tf32(allowed: bool) -> None:
    # torch's default for products is off, for convolutions on: both follow the recipe.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def choose_dtype(wanted: str, device: str, comm: "MPI.Intracomm", console: Console) -> str:
    """Return the dtype of the run. Every rank calls it.

    `default` is float32 on CPUs and `auto` on GPUs. `auto` times one product in each dtype. A dtype
    that was asked for and is slower than float32 is taken, with a warning. Raises LayoutError for
    one that the device does not have.
    """
    kind = device.partition(":")[0]
    if wanted == "default":
        wanted = "float32" if kind == "cpu" else "auto"
    if wanted == "float32":
        return wanted
    # float16 ends at 65,504, so it needs a scaled loss: only where bfloat16 is slow, and on GPUs.
    candidates = ["bfloat16", *(["float16"] if kind == "cuda" else [])]
    names = candidates if wanted == "auto" else [wanted]
    times = product_seconds(device, ["float32", *names])
    # The slowest rank decides: all compute in one dtype.
    shares = {
        name: max(comm.allgather(times[name] / times["float32"] if name in times else float("inf")))
        for name in names
    }
    if wanted == "auto":
        taken = next((name for name in names if shares[name] < WORTHWHILE[kind]), "float32")
        found = ", ".join(f"{name} {_times_as_fast(shares[name])}" for name in names)
        console.say(f"train.dtype = auto: {taken} (products against float32: {found})")
        return taken
    if shares[wanted] == float("inf"):
        raise LayoutError(f"train.dtype = {wanted}: {device} has no such products; take float32")
    if shares[wanted] > 1:
        console.warn(
            f"train.dtype = {wanted}: its products are {_times_as_fast(shares[wanted])} as in "
            "float32 on this processor; train.dtype=float32 is faster here"
        )
    return wanted


def _times_as_fast(share: float) -> str:
    return "not at all" if share == float("inf") else f"{1 / share:.2g} times as fast"


def product_seconds(device: str, names: list[str]) -> dict[str, float]:
    """Time one matrix product of each dtype, float32 first; one that fails is left out."""
    found: dict[str, float] = {}
    for name in names:
        try:
            found[name] = _product_seconds(device, torch_dtype(name), found.get("float32"))
        except RuntimeError:
            continue
    return found


def _product_seconds(device: str, dtype: torch.dtype, float32: float | None) -> float:
    rows, inner, columns = PRODUCT
    a = torch.ones(rows, inner, dtype=dtype, device=device)
    b = torch.ones(columns, inner, dtype=dtype, device=device)
    least = float("inf")
    # The first call may set up libraries.
    for _ in range(1 + REPEATS):
        begin = time.perf_counter()
        torch.nn.functional.linear(a, b)
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
        seconds = time.perf_counter() - begin
        least = min(least, seconds)
        if float32 is not None and seconds > HOPELESS * float32:
            break
    return least
