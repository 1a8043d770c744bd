"""CUDA-aware MPI: whether MPI takes the memory of a GPU as it is."""

from collections.abc import Iterable, Mapping

from mpillm.doctor.check_base import Check, HostView
from mpillm.doctor.checks.gpu_count import torch_gpus
from mpillm.doctor.findings import Finding

AREA, NAME = "GPU", "CUDA-aware MPI"


class CudaAwareCheck(Check):
    name, area = NAME, AREA

    def examine_host(self, host: HostView) -> Iterable[Finding]:
        # The trials take seconds, so only a host with GPUs makes them.
        if not torch_gpus(host):
            return []
        from mpillm.comm.gpu.probe import probe

        return [judge_aware(probe(host.job.environment))]


def judge_aware(trials: Mapping[str, bool]) -> Finding:
    """Judge the trials of GPU memory; where MPI refuses it, mpillm copies through the host."""
    # comm needs packages that may be what is missing, so it is imported by what needs it.
    from mpillm.comm.gpu.gpu_aware import MESSAGES

    good = [trial for trial, well in trials.items() if well]
    if trials and len(good) == len(trials):
        return Finding(AREA, NAME, "ok", f"yes: {', '.join(good)}")
    if trials.get(MESSAGES):
        bad = [trial for trial, well in trials.items() if not well]
        found = f"in part: {', '.join(good)}; through the host: {', '.join(bad)}"
        return Finding(AREA, NAME, "ok", found)
    found = "no: messages of GPUs pass through the host's memory, correct but slower"
    remedy = (
        "for more speed load an MPI that was built with CUDA "
        "(Open MPI: ompi_info | grep cuda; MPICH: --with-cuda)"
    )
    return Finding(AREA, NAME, "warning", found, remedy)
