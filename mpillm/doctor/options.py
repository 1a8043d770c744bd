"""What doctor is asked, and the functions of higher rooms that it uses; `cli` hands them in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DoctorOptions:
    paths: tuple[Path, ...] = ()
    """Folders to try; none: the current folder and the one for temporary files."""
    profile: Path | None = None
    """A cluster profile to judge."""
    hosts: tuple[str, ...] = ()
    """Hosts to reach; none: those of the scheduler's allocation."""
    gpus: int | None = None
    """GPUs that each host should have; None: as the site file says, if it does."""
    site: Path | None = None
    """The site file; None: the user's own, where there is one."""
    as_json: bool = False


@dataclass(frozen=True)
class Probes:
    """launch may not import comm, so this names what doctor takes of it. A package that comm needs may be what is
    missing, so each of them imports its room when it is called.
    """

    gpu_probe: Callable[[Mapping[str, str]], Mapping[str, bool]]
    """comm.gpu.probe.probe: which operations MPI does with memory of a GPU."""
    describe_cluster: Callable[[Any], Any]
    """comm.profile.describe_cluster; every rank calls it."""
    load_profile: Callable[[Path, Callable[[str], None], Any], Any]
    """comm.profile.load_profile"""
    kernel: str = "mpillm.comm.kernel"
    """The compiled module that must load."""
