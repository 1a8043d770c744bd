"""Whether a person watches: a bar that is redrawn is a comfort on a terminal and rubbish in a log."""

import os
from collections.abc import Mapping
from pathlib import Path

from mpillm.launch.ranks import RANK_VARIABLES


def watched(environment: Mapping[str, str]) -> bool:
    """True when this process's output ends at a terminal, as far as can be known.

    Open MPI hands each rank a pseudo-terminal even when mpirun's own output goes to a file, so under a launcher it is
    the parent's output that counts.
    """
    if not os.isatty(1):
        return False
    if not any(variable in environment for variable in RANK_VARIABLES):
        return True
    try:
        return str(Path(f"/proc/{os.getppid()}/fd/1").readlink()).startswith(
            ("/dev/pts/", "/dev/tty")
        )
    except OSError:
        return False
