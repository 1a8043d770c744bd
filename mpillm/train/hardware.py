"""Choose the device and the dtype of a run, the same on all ranks, before its first step."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mpillm.errors import LayoutError, RecipeError
from mpillm.machine.node_map import NodeMap
from mpillm.parallel.devices import choose_device
from mpillm.parallel.precision import torch_dtype
from mpillm.parallel.step_plan import ELEMENT_BYTES, Precision
from mpillm.system.console import Console
from mpillm.system.environment import set_default

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.train.recipe import TrainSettings

# Tokens × width × width of the product that is timed: a millisecond in float32 on one core. A GPU
# takes a smaller time than the start of a kernel (10 µs) for that: all dtypes would seem alike.
PRODUCT = {"cpu": (128, 512, 512), "cuda": (2048, 2048, 2048)}
REPEATS = 3
# `auto` takes a lower dtype where its product takes less than this share of float32's time. The
# rest of a step gains nothing, and conversions cost.
WORTHWHILE = {"cpu": 0.5, "cuda": 0.9}
# A dtype that is emulated can take a hundred times as long: one call is enough to see that.
HOPELESS = 40.0


@dataclass(frozen=True)
class Hardware:
    """What a run computes on, and in which dtypes."""

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
    by `auto` then stays. Raises LayoutError and RecipeError on every rank.
    """
    settings = _kept(settings, recorded)
    device, words = choose_device(
        settings.device, comm, node_map, settings.gpus, settings.share_gpu
    )
    kind = device.partition(":")[0]
    _allow_tf32(settings.tf32)
    if kind == "cuda":
        _repeat_bits(settings.fixed_order)
    dtype = choose_dtype(settings.dtype, device, comm, console)
    if settings.reduce_dtype == "float16" and dtype != "float16":
        # Found on all ranks alike: the dtype is the same.
        raise RecipeError(
            f"train.reduce_dtype = float16 with train.dtype = {dtype}: gradients below 6e-8 would "
            "vanish in the sums, for the loss is scaled in float16 alone; take bfloat16 or float32"
        )
    return Hardware(Precision(kind, dtype, settings.reduce_dtype), words)


def _kept(settings: "TrainSettings", recorded: Mapping[str, Any]) -> "TrainSettings":
    """Replace what the recipe leaves open by what the checkpoint's run had."""
    device, dtype = recorded.get("device"), recorded.get("dtype")
    if settings.device == "auto" and device in ("cpu", "cuda"):
        settings = replace(settings, device=device)
    if settings.dtype in ("default", "auto") and dtype in ELEMENT_BYTES:
        settings = replace(settings, dtype=dtype)
    return settings


# Dtypes -----------------------------------------------------------------------------------------


def _allow_tf32(allowed: bool) -> None:
    # torch's default for products is off, for convolutions on: both follow the recipe.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def _repeat_bits(wanted: bool) -> None:
    """Let torch take only kernels of a GPU that give the same bits in each run, or any.

    The backward pass of attention otherwise adds up in the order in which its blocks end.
    """
    if wanted:
        # Before the first product: torch asks for it, and cuBLAS reads it once.
        set_default("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Memory without values is always written before it is read here; filling it takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # The call loads torch's compiler, which takes seconds.
    if wanted != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(wanted)


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
            # Without this one there is nothing to compare with, such as on a GPU that is full.
            if name == "float32":
                raise
    return found


def _product_seconds(device: str, dtype: torch.dtype, float32: float | None) -> float:
    rows, inner, columns = PRODUCT[torch.device(device).type]
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
