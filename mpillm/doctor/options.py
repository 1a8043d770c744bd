"""The options of `mpillm doctor`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DoctorOptions:
    """What a user asks of the doctor; every field may be left out."""

    paths: tuple[Path, ...] = ()
    """Folders to try; none: the current folder and the one for temporary files."""
    profile: Path | None = None
    """A cluster profile to check; None: that of the site file."""
    hosts: tuple[str, ...] = ()
    """Hosts to reach; none: those of the scheduler's allocation."""
    gpus: int | None = None
    """GPUs that each host should have; None: as the site file says."""
    site: Path | None = None
    """The site file; None: the user's own, where there is one."""
    as_json: bool = False
    checks: tuple[str, ...] = ()
    """Further checks, each as `package.module:Name`; they run after mpillm's own."""
