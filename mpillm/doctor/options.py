"""What doctor is asked, and the functions of higher rooms that it uses; `cli` hands them in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from mpillm.system.command_line import Argument, Json, Option


@dataclass(frozen=True)
class DoctorOptions:
    paths: Annotated[
        tuple[Path, ...],
        Argument(
            "Folders for runs and data; without any the current and the temporary folder.",
            metavar="PATH…",
        ),
    ] = ()
    profile: Annotated[
        Path | None, Option("A cluster profile to judge.", metavar="PROFILE.json")
    ] = None
    hosts: Annotated[
        tuple[str, ...],
        Option("Hosts to reach; else those of the allocation.", metavar="A,B,…", commas=True),
    ] = ()
    gpus: Annotated[int | None, Option("GPUs that each host should have.")] = None
    site: Annotated[
        Path | None, Option("Another site file than your own.", metavar="SITE.toml")
    ] = None
    as_json: Json = False


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
