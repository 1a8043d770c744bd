"""The small model that all tests of compression begin with."""

from pathlib import Path

import pytest
from mpi4py import MPI

from tests.infer.compress.small_model import train_small


@pytest.fixture(scope="session")
def small(shared_folder: Path, documents: Path, comm: MPI.Intracomm) -> Path:
    """Train the model once a session; return the folder of run/ and data/."""
    folder = shared_folder / "compress"
    train_small(folder, documents, comm)
    return folder
