from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.system.console import Console
from mpillm.tokens.prepare import PrepareOptions, prepare


@pytest.fixture(scope="session")
def data(shared_folder: Path, documents: Path, comm: MPI.Intracomm) -> Path:
    """Prepare a small dataset of bytes. Tests read it; none writes into it."""
    out = shared_folder / "train-data"
    options = PrepareOptions((str(documents),), out, tokenizer="bytes", validation=0.1)
    prepare(options, comm, Console(speaks=False))
    return out
