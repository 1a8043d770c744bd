"""The interface of a check, and what it is given of the job, of a host and of the ranks.

A check is a class of the catalogue or a user's own, named as `package.module:Name`. It implements
one of three methods or several. Findings of hosts that differ in numbers alone become one row.
"""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from mpillm.comm.waiting import wait_patiently
from mpillm.doctor.findings import Finding, FindingRow
from mpillm.doctor.mpi_look import MpiLook
from mpillm.doctor.options import DoctorOptions
from mpillm.errors import LaunchError
from mpillm.launch.placement import RankPlace
from mpillm.machine.node_map import NodeMap

if TYPE_CHECKING:
    from mpi4py import MPI

# Longer than the longest check of one rank, the imports of its packages.
MEETING_SECONDS = 300.0


@dataclass(frozen=True)
class SiteReading:
    """The site file, or why it cannot be read."""

    site: Any = None
    """The Site; None after a failure."""
    named: str = ""
    """The file that the user named, by option or variable."""
    failure: str = ""
    package_missing: bool = False
    """The failure is a package that reading needs."""


@dataclass(frozen=True)
class JobView:
    """The job: its options, its environment, its MPI library and its size."""

    options: DoctorOptions
    environment: Mapping[str, str]
    """The process's own, from before MPI_Init, which adds to it."""
    look: MpiLook
    site: SiteReading = field(default_factory=SiteReading)
    ranks: int = 1
    hosts: int = 1


@dataclass(frozen=True)
class HostView:
    """A host, for its first rank."""

    job: JobView
    quiet: Mapping[str, str]
    """The environment without the launcher's variables, for child processes."""
    masks: Sequence[AbstractSet[int]]
    """The CPUs that each rank on this host may run on."""
    facts: dict[str, str]
    """Name → value, by which hosts are compared; each check adds its own."""
    imports: dict[str, Any] = field(default_factory=dict)
    """Module → software.Imported, filled by the check of software."""


@dataclass(frozen=True)
class World:
    """The ranks of the job, and everything that is known before they compare themselves."""

    comm: "MPI.Intracomm"
    node_map: NodeMap
    """The nodes of the ranks of `comm`."""
    node: "MPI.Comm"
    """The ranks of this host."""
    host_of: tuple[str, ...]
    """Rank → the name of its host."""
    job: JobView
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Host → its facts, on every rank."""
    rows: Sequence[FindingRow] = ()
    """The findings so far; complete on rank 0 alone."""
    places: Sequence[RankPlace] = ()

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.host_of))

    @property
    def host(self) -> str:
        return self.host_of[self.comm.rank]

    @property
    def leads(self) -> bool:
        """This rank is the first of its host."""
        return self.node.rank == 0

    def meet(self, seconds: float = MEETING_SECONDS) -> None:
        """Wait for every rank, asleep, with a time limit. Every rank calls it."""
        meet(self.comm, seconds)


class Check:
    """One check. Every method may be left out."""

    name: ClassVar[str]
    """The name of its finding where the check itself fails."""
    area: ClassVar[str]
    """The heading of its findings in the report."""

    def examine_job(self, job: JobView) -> Iterable[Finding]:
        """Check the job as a whole, on rank 0 alone, without messages."""
        return ()

    def examine_host(self, host: HostView) -> Iterable[Finding]:
        """Check a host, on its first rank, without messages; add its facts to `host.facts`."""
        return ()

    def examine_ranks(self, world: World) -> Iterable[Finding]:
        """Compare hosts or ranks by messages. Every rank calls it; rank 0's findings count.

        An exception on any rank ends the job, after a report of all that is known.
        """
        return ()


def meet(comm: "MPI.Intracomm", seconds: float = MEETING_SECONDS) -> None:
    """Wait for every rank of `comm`; early ranks sleep. Every rank calls it.

    A barrier with a time limit, for a rank that hangs or died must not block the others for good.
    Raises LaunchError where some ranks do not come within `seconds`.
    """
    if not wait_patiently(comm.Ibarrier(), seconds):
        raise LaunchError(
            f"some ranks did not come within {seconds:.0f} s, or their messages do not arrive; "
            "check the job's nodes and the firewall between them, then start again with fewer "
            "hosts to find the one that fails"
        )
