"""Data that an earlier mpillm prepared: it still opens, and preparing it again gives its bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.system.console import Console
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.reader import open_split
from mpillm.tokens.verify import verify

KEPT = Path(__file__).parent / "data_0_1"
QUIET = Console(speaks=False)


def texts() -> dict[str, str]:
    """Make the texts that the kept dataset was prepared from."""
    return {
        f"{i:02d}.txt": "".join(
            f"line {j} of document {i}: {'abc'[j % 3] * (j % 7 + 1)} é\n" for j in range(i % 5 + 3)
        )
        for i in range(24)
    }


def test_it_is_whole_and_its_texts_come_back(comm: MPI.Intracomm) -> None:
    manifest = verify(KEPT, comm, QUIET)
    tokenizer = manifest.load_tokenizer()
    found = []
    for split in ("train", "validation"):
        with open_split(KEPT, split) as reader:
            ids = np.empty(reader.n_tokens, reader.dtype)
            reader.read(0, ids)
        ends = np.flatnonzero(ids == tokenizer.eot_id)
        found += [tokenizer.decode(document) for document in np.split(ids, ends + 1)[:-1]]
    assert sorted(found) == sorted(texts().values())


def test_the_same_texts_give_the_same_files(
    folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The names of the sources are kept in each shard, so the folder has the name it had.
    monkeypatch.chdir(folder)
    if comm.rank == 0:
        Path("src").mkdir()
        for name, text in texts().items():
            (Path("src") / name).write_text(text)
    comm.Barrier()
    options = PrepareOptions(
        ("src",), Path("data"), tokenizer="bytes", validation=0.2, shard_bytes=4096
    )
    made = prepare(options, comm, QUIET)
    assert made.manifest_hash == Manifest.load(KEPT).manifest_hash
    for file in KEPT.iterdir():
        if file.name != "manifest.json":
            assert (folder / "data" / file.name).read_bytes() == file.read_bytes(), file.name
    # A manifest has its own digest now, at its end; version 0.1 wrote none.
    now = json.loads((folder / "data" / "manifest.json").read_text())
    assert now.pop("digest") == made.manifest_hash
    assert json.dumps(now) == json.dumps(json.loads((KEPT / "manifest.json").read_text()))
    comm.Barrier()
