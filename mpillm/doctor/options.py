"""The options of `mpillm doctor`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mpillm.system.command_line import Argument, Json, Option


@dataclass(frozen=True)
class DoctorOptions:
    """What a user asks of the doctor; every field may be left out."""

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
    gpus: Annotated[
        int | None, Option("GPUs that each host should have.", minimum=0, maximum=1024)
    ] = None
    site: Annotated[
        Path | None, Option("Another site file than your own.", metavar="SITE.toml")
    ] = None
    checks: Annotated[
        tuple[str, ...],
        Option(
            "A check of your own, run after the others.",
            flag="--check",
            metavar="package.module:Name",
        ),
    ] = ()
    as_json: Json = False
