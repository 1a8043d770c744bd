"""Versions of mpillm and its packages: the first question of every bug report."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("mpillm", "mpi4py", "torch", "h5py", "numpy", "tokenizers")


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Return name → version of mpillm, MPI, the main packages, HDF5 and Python.

    Loads MPI, but does not start it, and h5py.
    """
    found = {name: package_version(name) for name in PACKAGES}
    import h5py

    found["HDF5"] = h5py.version.hdf5_version
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI

        found["MPI"] = MPI.Get_library_version().split("\n")[0].strip("\0 ")
    except (ImportError, RuntimeError) as failure:
        found["MPI"] = f"none: {failure}"
    found["Python"] = platform.python_version()
    return found


def print_versions(verbose: bool) -> None:
    """Print mpillm's version, with `verbose` those of all parts."""
    from mpillm.system.console import Console

    if verbose:
        Console().facts("versions", versions())
    else:
        Console().say(f"mpillm {package_version('mpillm')}")
