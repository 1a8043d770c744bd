"""The MPI libraries by name, as each library and each mpirun prints it, and where its mpirun is."""

import re
from dataclasses import dataclass
from pathlib import Path

# Tried in this order: Spectrum MPI also calls itself Open MPI. The group is the version.
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
# Within a family each mpirun starts the programs of each library: they share one start protocol.
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
    """Recognize a library by its own text or by the text of its mpirun.

    `mpirun (Open MPI) 5.0.11` → Open MPI 5.0.11; so is the text of MPI_Get_library_version. An
    unknown library is named by its first line.
    """
    for pattern, name in NAMES:
        if found := re.search(pattern, text):
            return MpiName(name, found[1].rstrip("."))
    return MpiName(text.strip("\0 \n").partition("\n")[0][:60])


def mpirun_of(maps: str) -> str:
    """Find the mpirun of the loaded MPI library; "" where there is none.

    `maps` is the text of /proc/self/maps, which lists the files that a process has loaded.
    """
    for library in re.findall(r"(/\S*/libmpi(?:ch)?\.so\S*)", maps):
        # Debian lets several MPIs share /usr; their commands differ by a suffix.
        names = ("mpirun.openmpi" if "openmpi" in library else "mpirun.mpich", "mpirun", "mpiexec")
        for prefix in list(Path(library).parents)[:-1]:
            for name in names:
                if (prefix / "bin" / name).is_file():
                    return str(prefix / "bin" / name)
    return ""
