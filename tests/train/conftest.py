from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.system.console import Console
from mpillm.tokens.prepare import PrepareOptions, prepare


@pytest.fixture
def data(folder: Path, documents: Path, comm: MPI.Intracomm) -> Path:
    """A small dataset of bytes."""
    out = folder / "data"
    options = PrepareOptions((str(documents),), out, tokenizer="bytes", validation=0.1)
    prepare(options, comm, Console(speaks=False))
    return out
