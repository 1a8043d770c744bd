"""GPUs: how many torch can use, and whether that is what the site file or the user expects."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpillm.doctor.check_base import Check, HostView
from mpillm.doctor.findings import Finding
from mpillm.launch.current_job import current_job
from mpillm.machine.gpus import visible_gpus

AREA = "GPU"
REMEDY = (
    "ask the batch system for them (sbatch --gpus-per-node=N), check nvidia-smi and "
    "CUDA_VISIBLE_DEVICES (docker: --gpus all)"
)


class GpuCountCheck(Check):
    name, area = "count", AREA

    def examine_host(self, host: HostView) -> Iterable[Finding]:
        job, visible = host.job, visible_gpus(host.job.environment)
        names, build = torch_gpus(host), ""
        if "torch" in host.imports:
            build = build_of(host.imports["torch"].facts)
        host.facts["GPUs"] = f"{len(names)} × {names[0]}" if names else "none"
        wanted, source = job.options.gpus, "--gpus"
        site_gpus = getattr(job.site.site, "gpus_per_node", 0)
        # Outside of a job this may be a login node, which has no GPUs.
        if wanted is None and site_gpus and current_job(job.environment):
            wanted, source = site_gpus, "the site file"
        return [judge_gpus(names, visible, wanted, build, source)]


def torch_gpus(host: HostView) -> list[str]:
    """Return the names of the GPUs that torch's import found; none without torch."""
    torch = host.imports.get("torch")
    return list(torch.facts.get("gpus", ())) if torch else []


def build_of(facts: Mapping[str, Any]) -> str:
    """Name torch's build: `CPU`, `CUDA 12.8` or `ROCm 6.2`."""
    versions = {"CUDA": facts.get("cuda"), "ROCm": facts.get("hip")}
    return next((f"{name} {version}" for name, version in versions.items() if version), "CPU")


def judge_gpus(
    names: Sequence[str], visible: Sequence[str], wanted: int | None, build: str, source: str
) -> Finding:
    """Judge the GPUs that torch can use, `names`, of those that this process may see, `visible`.

    `wanted` is the number by `source`, "--gpus" or the site file. `build` is torch's, and empty
    without torch: then the visible GPUs count.
    """
    found = f"{len(names)} × {names[0]}" if len(set(names)) == 1 else ", ".join(names) or "none"
    remedy, usable = REMEDY, len(names)
    if not build and visible:
        found, usable = f"{len(visible)} visible; torch is not installed to use them", len(visible)
    elif len(visible) > len(names):
        found = f"torch (built for {build}) can use {len(names)} of {len(visible)} GPUs"
        if build == "CPU":
            remedy = "install torch for the driver's CUDA, by pytorch.org/get-started"
    if wanted is not None and wanted != usable:
        found = f"{found}, where {wanted} should be by {source}"
        return Finding(AREA, "count", "error", found, remedy)
    if len(visible) > usable:
        return Finding(AREA, "count", "warning", found, remedy)
    return Finding(AREA, "count", "ok", found)
