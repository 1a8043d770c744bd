"""GPUs: how many torch can use, whether that is what the site promises, and whether MPI takes their memory."""

from collections.abc import Mapping, Sequence

from mpillm.doctor.findings import Finding

AREA = "GPU"
MESSAGES = "messages"
"""comm.gpu.probe's name for sends and receives."""


def judge_gpus(
    names: Sequence[str], devices: int, wanted: int | None, build: str, whose: str
) -> Finding:
    """`names`: of the GPUs that torch can use; `devices`: how many this process may see; `wanted`: how many there
    should be, by `whose` word ("--gpus", or the site file).
    """
    found = f"{len(names)} × {names[0]}" if len(set(names)) == 1 else ", ".join(names) or "none"
    remedy = (
        "ask the batch system for them (sbatch --gpus-per-node=N), look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        " (docker: --gpus all)"
    )
    if devices > len(names):
        found = f"torch (built for {build}) can use {len(names)} of {devices} GPUs"
        if build == "CPU":
            remedy = "install torch for the driver's CUDA, as pytorch.org/get-started tells"
    if wanted is not None and wanted != len(names):
        return Finding(
            AREA, "count", "error", f"{found}, where {wanted} should be by {whose}", remedy
        )
    if devices > len(names):
        return Finding(AREA, "count", "warning", found, remedy)
    return Finding(AREA, "count", "ok", found)


def judge_aware(trials: Mapping[str, bool]) -> Finding:
    """Whether MPI takes memory of a GPU as it is; where not, mpillm passes it through the host."""
    name = "CUDA-aware MPI"
    good = [trial for trial, well in trials.items() if well]
    if trials and len(good) == len(trials):
        return Finding(AREA, name, "ok", f"yes: {', '.join(good)}")
    if trials.get(MESSAGES):
        bad = [trial for trial, well in trials.items() if not well]
        return Finding(
            AREA, name, "ok", f"in part: {', '.join(good)}; through the host: {', '.join(bad)}"
        )
    remedy = "load an MPI that was built with CUDA (Open MPI: ompi_info | grep cuda; MPICH: --with-cuda) for more speed"
    return Finding(
        AREA,
        name,
        "warning",
        "no: messages of GPUs pass through the host's memory, correct but slower",
        remedy,
    )
