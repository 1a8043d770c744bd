"""What the environment tells of this process's rank before MPI is loaded."""

from collections.abc import Mapping

from mpillm.launch.launchers import LAUNCHERS, detect

# In the order of trust.
RANK_VARIABLES = tuple(dict.fromkeys(launcher.rank for launcher in LAUNCHERS))


def rank_from_environment(environment: Mapping[str, str]) -> int:
    """This process's rank as its launcher tells it, 0 where none does: so that `--help` is not said N times."""
    return detect(environment).rank
