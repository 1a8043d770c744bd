"""The GPUs of this process, without a GPU library: those take seconds and memory to load."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpillm.machine.topology import ROOT

# Variables that hide GPUs from a process, by maker; the first that is set counts.
VISIBLE = {
    "cuda": ("CUDA_VISIBLE_DEVICES",),
    "rocm": ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
}


def visible_gpus(environment: Mapping[str, str], root: Path = ROOT) -> list[str]:
    """List the GPUs that this process sees, in device order: `cuda 0`, `cuda GPU-8f3b…`, `rocm 1`.

    The name is the driver's and not the process's number: with CUDA_VISIBLE_DEVICES=2,3 device 0
    is `cuda 2`.
    """
    for maker, count in (("cuda", _nvidia_gpus(root)), ("rocm", _amd_gpus(root))):
        if count:
            return [f"{maker} {name}" for name in _seen(environment, VISIBLE[maker], count)]
    return []


def gpu_of(local_rank: int, gpus: Sequence[str]) -> str:
    """Return the GPU of the node's rank `local_rank`, in turn; "" without any."""
    return gpus[local_rank % len(gpus)] if gpus else ""


def _seen(environment: Mapping[str, str], variables: Sequence[str], count: int) -> list[str]:
    """Read the first variable that is set, up to its first unknown GPU, as CUDA does."""
    for variable in variables:
        if variable in environment:
            names = [name.strip() for name in environment[variable].split(",")]
            known = [
                bool(re.match(r"GPU-|MIG-", name)) or (name.isdigit() and int(name) < count)
                for name in names
            ]
            return names[: known.index(False)] if False in known else names
    return [str(number) for number in range(count)]


def _nvidia_gpus(root: Path) -> int:
    """Count by the driver's list; in a container that lacks it, by the device files."""
    listed = len(list((root / "proc/driver/nvidia/gpus").glob("*")))
    return listed or len(list((root / "dev").glob("nvidia[0-9]*")))


def _amd_gpus(root: Path) -> int:
    """Count by the nodes of AMD's compute driver: those with vector units are GPUs."""
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")
    return sum(
        bool(re.search(r"^simd_count [1-9]", node.read_text(encoding="ascii"), re.MULTILINE))
        for node in nodes
    )
