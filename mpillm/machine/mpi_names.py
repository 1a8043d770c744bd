"""The MPI libraries by name: what each, and its mpirun, calls itself."""

import re
from dataclasses import dataclass

# In the order in which they are asked; the version follows.
NAMES = (
    (r"Spectrum MPI\D*([\d.]*)", "Spectrum MPI"),
    (r"Open MPI\)? v?(\d[\w.]*)", "Open MPI"),
    (r"(?:OpenRTE|PRRTE)\)? v?([\d.]*)", "Open MPI"),
    (r"Intel\(R\) MPI Library[^\d]*([\d.]*)", "Intel MPI"),
    (r"MVAPICH2? ?Version\s*:?\s*(\d[\w.]*)", "MVAPICH"),
    (r"CRAY MPICH version (\d[\w.]*)", "Cray MPICH"),
    (r"MPICH Version:\s*(\d[\w.]*)", "MPICH"),
    (r"HYDRA build details:\s*Version:\s*(\d[\w.]*)", "MPICH"),
)
# Families in which one library's mpirun starts another's programs, for they speak the same protocol.
PMIX, PMI = "PMIx", "PMI"
FAMILIES = {"Spectrum MPI": PMIX, "Open MPI": PMIX} | dict.fromkeys(
    ("Intel MPI", "MVAPICH", "Cray MPICH", "MPICH"), PMI
)


@dataclass(frozen=True)
class MpiName:
    """A name and a version; both "" where unknown."""

    name: str = ""
    version: str = ""

    @property
    def text(self) -> str:
        return f"{self.name} {self.version}".strip() or "unknown"

    @property
    def family(self) -> str:
        """Whose mpirun may start its programs; empty where unknown."""
        return FAMILIES.get(self.name, "")


UNKNOWN = MpiName()


def named(text: str) -> MpiName:
    """`mpirun (Open MPI) 5.0.11` → Open MPI 5.0.11; also of what MPI_Get_library_version says. The first line where it
    is none that we know.
    """
    for pattern, name in NAMES:
        if found := re.search(pattern, text):
            return MpiName(name, found[1].rstrip("."))
    return MpiName(text.strip("\0 \n").partition("\n")[0][:60])
