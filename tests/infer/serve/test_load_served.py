"""What can be served: a run, a Hugging Face folder, a GGUF file; each with the same weights."""

from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import CheckpointError, LayoutError, UsageError
from mpillm.infer.export_model import export_model
from mpillm.infer.serve.load_served import load_served
from mpillm.infer.serve.open_engine import EngineOptions, open_engine
from mpillm.system.console import Console
from tests.infer.serve.http.served import publish_chat

QUIET = Console(speaks=False)


@pytest.fixture
def chat_run(folder: Path, comm: MPI.Intracomm) -> Path:
    pytest.importorskip("safetensors")
    pytest.importorskip("gguf")
    if comm.rank == 0:
        publish_chat(folder)
    comm.Barrier()
    return folder / "chat"


def test_a_run_a_folder_and_a_file_are_the_same_model(chat_run: Path, comm: MPI.Intracomm) -> None:
    file = chat_run.parent / "m.gguf"
    export_model(chat_run, file, "gguf", "float32", comm, QUIET)
    comm.Barrier()
    own = load_served(chat_run, comm, QUIET)
    model = own.whole()
    ids = torch.tensor([[104, 105, 257, 0]])
    for path in (chat_run.parent / "hub", file):
        other = load_served(path, comm, QUIET)
        whole = other.whole()
        with torch.inference_mode():
            assert torch.allclose(whole(ids), model(ids), atol=1e-5)
        assert other.tokenizer.encode("hé") == own.tokenizer.encode("hé")
        assert other.template.text == own.template.text
        assert other.tokenizer.end_of_text == own.tokenizer.end_of_text


def test_what_cannot_be_served_is_refused_on_all_ranks(chat_run: Path, comm: MPI.Intracomm) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_served(chat_run.parent / "none", comm, QUIET)
    with pytest.raises(UsageError, match="more than the 128 tokens"):
        open_engine(chat_run, EngineOptions(context=500), comm, QUIET)
    with pytest.raises(LayoutError, match=f"cannot be {comm.size} ranks"):
        open_engine(chat_run, EngineOptions(tensor=7), comm, QUIET)
    if comm.size == 3:
        # Four heads, and two layers.
        with pytest.raises(LayoutError, match="divides 4 heads"):
            open_engine(chat_run, EngineOptions(context=50), comm, QUIET)
        return
    with pytest.raises(UsageError, match="--cache-tokens 1,000,000,000,000 needs"):
        open_engine(chat_run, EngineOptions(cache_tokens=10**12), comm, QUIET)
    opened = open_engine(chat_run, EngineOptions(context=50), comm, QUIET)
    assert (opened.engine is None) == bool(comm.rank)
    if opened.engine is not None:
        assert opened.own.context == 50
        opened.own.close()
    opened.follow()
