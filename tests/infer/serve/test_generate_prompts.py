"""A file of prompts gives the texts of each prompt alone, at any number of ranks."""

import io
import json
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.errors import UsageError
from mpillm.infer.generate import sample_tokens
from mpillm.infer.sampling import Sampling
from mpillm.infer.serve import generate_prompts
from mpillm.infer.serve.generate_prompts import print_texts
from mpillm.infer.serve.load_served import load_served
from mpillm.system.console import Console
from mpillm.verbs.generate import Generate
from tests.infer.serve.http.served import publish_chat

pytest.importorskip("safetensors")


@pytest.fixture
def chat_run(folder: Path, comm: MPI.Intracomm) -> Path:
    made = folder / "prompts"
    if comm.rank == 0:
        made.mkdir()
        publish_chat(made)
    comm.Barrier()
    return made / "chat"


def written(path: Path, run: Path, comm: MPI.Intracomm, sampling: Sampling) -> list[dict[str, str]]:
    stream = io.StringIO()
    print_texts(run, path, sampling, comm, Console(comm.rank == 0, stream), "cpu")
    return [json.loads(line) for line in comm.bcast(stream.getvalue()).split("\n") if line]


def test_texts_in_order(
    chat_run: Path, folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_prompts, "ROUND", 2)
    path, lines = (
        folder / "prompts.txt",
        ["ab", "", "hello there", "x\u2028y", "what", "z" * 100, "q"],
    )
    if comm.rank == 0:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    comm.Barrier()
    sampling = Sampling(40, temperature=0.7, top_k=20, seed=5)
    found = written(path, chat_run, comm, sampling)
    served = load_served(chat_run, comm, Console(False))
    model, tokenizer = served.whole(), served.tokenizer
    kept = [line for line in lines if line]
    assert [each["prompt"] for each in found] == kept
    for number, (line, each) in enumerate(zip(kept, found, strict=True)):
        ids = tokenizer.encode(line)
        most = min(40, model.spec.context - len(ids))
        own = Sampling(most, temperature=0.7, top_k=20, seed=5 + number)
        expected = list(sample_tokens(model, ids, own))
        tokens = int(each["tokens"])
        assert each["text"] == tokenizer.decode(expected[:tokens])
        assert each["finish"] == ("length" if tokens == most else "stop")
    assert found == written(path, chat_run, comm, sampling)


def test_conversations_and_wrong_lines(chat_run: Path, folder: Path, comm: MPI.Intracomm) -> None:
    path = folder / "prompts.jsonl"
    for record, words in (
        ({"messages": [{"role": "user", "content": "hi"}]}, ""),
        ({"prompt": ""}, ""),
        ({"text": "hi"}, "line 1: it has neither"),
        ({"messages": [{"role": 3}]}, "line 1"),
        ({"prompt": "z" * 500}, "the context is 128"),
    ):
        if comm.rank == 0:
            path.write_text(json.dumps(record))
        comm.Barrier()
        if words:
            with pytest.raises(UsageError, match=words):
                written(path, chat_run, comm, Sampling(4))
        else:
            assert len(written(path, chat_run, comm, Sampling(4))) == 1
        comm.Barrier()
    with pytest.raises(UsageError, match="cannot read --prompts"):
        written(folder / "none", chat_run, comm, Sampling(4))


def test_one_prompt_or_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--prompt TEXT or a file"):
        Generate(tmp_path)
    with pytest.raises(UsageError, match="--prompt TEXT or a file"):
        Generate(tmp_path, "text", tmp_path)
    with pytest.raises(UsageError, match="messages"):
        Generate(tmp_path, prompts=tmp_path, chat=True)
