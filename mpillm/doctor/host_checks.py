"""Everything that one rank of a host finds out about it, without a message to any other."""

import socket
import tempfile
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mpillm.doctor import folders, gpu_count, host, mpi_start, network, software
from mpillm.doctor.findings import Finding, guarded
from mpillm.doctor.options import DoctorOptions, Probes
from mpillm.launch.current_job import current_job
from mpillm.launch.threads import allowance, threads_wish
from mpillm.machine.gpus import visible_gpus
from mpillm.machine.topology import read_topology
from mpillm.system.environment import without_launcher


@dataclass(frozen=True)
class HostJob:
    """What the checks of a host must know of the job around it."""

    masks: Sequence[AbstractSet[int]]
    """The CPUs that each rank on this host may run on."""
    ranks: int = 1
    """Of the whole job."""
    hosts: int = 1
    site_gpus: int = 0
    """GPUs of a host by the site file, 0 where it says nothing."""


@dataclass(frozen=True)
class Local:
    """One host's findings, and its facts: what → value, by which hosts are compared."""

    host: str
    findings: tuple[Finding, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def wished_paths(options: DoctorOptions, environment: Mapping[str, str]) -> tuple[Path, ...]:
    """The folders that the user named, else the current one and the one for temporary files."""
    here = Path(environment.get("PWD") or "/")
    with suppress(FileNotFoundError):  # the current folder was removed
        here = Path.cwd()
    return tuple(
        dict.fromkeys(
            options.paths or (here, Path(environment.get("TMPDIR") or tempfile.gettempdir()))
        )
    )


def examine(
    options: DoctorOptions,
    probes: Probes,
    environment: Mapping[str, str],
    look: mpi_start.Look,
    job: HostJob,
) -> Local:
    """All checks of this host. `environment` is the process's own. Each check that raises becomes a finding."""
    quiet = without_launcher(environment)
    facts: dict[str, str] = {"MPI library": look.library.text}
    imports: dict[str, software.Imported] = {}

    def check_software() -> list[Finding]:
        found = software.read_software(quiet, probes.kernel)
        imports.update(found.imports)
        names = ("mpillm", "torch", "h5py", "numpy")
        facts.update(
            {"Python": found.python} | {name: found.versions.get(name, "") for name in names}
        )
        return software.judge_software(found, probes.kernel)

    findings = guarded(software.AREA, "packages", check_software)
    findings += guarded(host.AREA, "host", lambda: check_machine(environment, job, facts))
    findings += guarded(network.AREA, "interfaces", lambda: check_network(job, facts))
    findings += guarded(
        gpu_count.AREA,
        "count",
        lambda: check_gpus(options, probes, environment, job, imports.get("torch"), facts),
    )
    for path in wished_paths(options, environment):
        findings += guarded(
            folders.AREA, str(path), partial(check_folder, path, environment, quiet)
        )
    return Local(socket.gethostname(), tuple(findings), facts)


def check_folder(
    path: Path, environment: Mapping[str, str], quiet: Mapping[str, str]
) -> list[Finding]:
    return folders.judge_folder(folders.read_folder(path, quiet), environment)


def check_machine(
    environment: Mapping[str, str], job: HostJob, facts: dict[str, str]
) -> list[Finding]:
    topology, memory = read_topology(), host.read_memory()
    cores = host.cores_of(job.masks, topology, allowance(environment), threads_wish(environment))
    facts |= {
        "Linux": host.system(),
        "processor": host.processor(),
        "cores": str(cores.all_cores),
        "memory": f"{round(memory.total / (1 << 30))} GiB",
    }
    return [
        *host.judge_parts(topology, facts["processor"], facts["Linux"]),
        host.judge_cores(cores),
        host.judge_memory(memory, cores.ranks),
        host.judge_shared(host.read_shared(), cores.ranks),
        *host.judge_limits(host.read_limits(), job.ranks, bool(network.read_ports())),
    ]


def check_network(job: HostJob, facts: dict[str, str]) -> list[Finding]:
    ports = network.read_ports()
    facts["InfiniBand"] = ", ".join(port.text for port in ports) or "none"
    return [
        network.judge_interfaces(network.read_interfaces(), job.hosts),
        network.judge_ports(ports),
    ]


def check_gpus(
    options: DoctorOptions,
    probes: Probes,
    environment: Mapping[str, str],
    job: HostJob,
    torch: software.Imported | None,
    facts: dict[str, str],
) -> list[Finding]:
    """What torch's import told of GPUs; whether MPI takes their memory is tried only where there are some."""
    told: Mapping[str, Any] = torch.facts if torch else {}
    names, seen = list(told.get("gpus", ())), len(visible_gpus(environment))
    facts["GPUs"] = f"{len(names)} × {names[0]}" if names else "none"
    wanted, whose = options.gpus, "--gpus"
    if wanted is None and job.site_gpus and current_job(environment):
        wanted, whose = job.site_gpus, "the site file"
    findings = [gpu_count.judge_gpus(names, seen, wanted, software.build_of(told), whose)]
    return findings + ([gpu_count.judge_aware(probes.gpu_probe(environment))] if names else [])
