# ruff: noqa: F403, F405
"""mpillm for Spack 1.0 or newer; docs/install.md shows the commands.

The bounds are those of pyproject.toml: a test compares them.
"""

from pathlib import Path

from spack.package import *
from spack_repo.builtin.build_systems.python import PythonPackage


class PyMpillm(PythonPackage):
    """Train large language models on classic HPC clusters, over MPI alone."""

    # The repository of this recipe: what is committed there is installed.
    git = Path(__file__).resolve().parents[6].as_uri()

    license("Apache-2.0")

    version("main", branch="main")

    variant("train", default=True, description="Training, evaluation, generation and pictures")
    variant("cuda", default=False, description="Collectives on NVIDIA GPUs, through CuPy")

    depends_on("c", type="build")
    with default_args(type="build"):
        depends_on("py-meson-python@0.16:")
        depends_on("meson@1.2:")
        depends_on("ninja@1.11:")

    # No code is linked with MPI: mpi4py is, and mpirun must be of the same.
    depends_on("mpi", type="run")
    with default_args(type=("build", "run")):
        depends_on("python@3.11:")
        depends_on("py-annotated-types@0.6:")
        depends_on("py-h5py@3.10:")
        depends_on("py-jinja2@3.1.6:")
        depends_on("py-markupsafe@2.1:")
        depends_on("py-mpi4py@4.0:")
        depends_on("py-numpy@1.26:")
        depends_on("py-pydantic@2.7:")
        depends_on("py-rich@13.7:")
        depends_on("py-tokenizers@0.20:")
        depends_on("py-typer@0.12:")
        depends_on("py-xxhash@3.4:")
        depends_on("py-matplotlib@3.8:", when="+train")
        depends_on("py-tensorboard@2.16:", when="+train")
        depends_on("py-torch@2.5:", when="+train")
        depends_on("py-cupy@13.0:", when="+cuda")
