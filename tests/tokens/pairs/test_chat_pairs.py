"""Datasets of conversations: the same bytes at any number of ranks, the preview, wrong input."""

import hashlib
import json
import os
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.errors import DataError, MpillmError, UsageError
from mpillm.system.console import Console
from mpillm.tokens.chat.chat_encoder import ChatEncoder, learnt_part
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.pairs.pair_manifest import PairManifest
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.verify import verify
from tests.tokens.chat.templates import FOLDER, say, template, tokenizer
from tests.tokens.pairs.test_chat_rows import conversations, made

QUIET = Console(speaks=False)
# Files of LLaMA-Factory's data folder: records, and their format.
PUBLISHED = {
    "alpaca_en_demo.json": (999, "alpaca"),
    "identity.json": (91, "alpaca"),
    "glaive_toolcall_en_demo.json": (300, "sharegpt"),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a tokenizer with a template."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer.json").write_text(tokenizer().to_json())
    (tmp_path / "model/chat_template.jinja").write_text(template("chatml").text)
    return tmp_path / "model"


def options(sources: Any, out: Path, **more: Any) -> PrepareOptions:
    names = [sources] if isinstance(sources, Path) else sources
    given = {"task": "chat", "validation": 0.0, **more}
    return PrepareOptions(tuple(map(str, names)), out, **given)


def refused(sources: Any, out: Path, **more: Any) -> str:
    with pytest.raises(MpillmError) as failure:
        prepare(options(sources, out, **more), MPI.COMM_SELF, QUIET)
    return str(failure.value)


def test_the_bytes_are_the_same_at_any_number_of_ranks(folder: Path, comm: MPI.Intracomm) -> None:
    if comm.rank == 0:
        made(folder, conversations(300), validation=0.2, shard_bytes=8192)
        for number in range(3):
            lines = [json.dumps({"messages": chat}) for chat in conversations(300)[number::3]]
            (folder / f"part-{number}.jsonl").write_text("\n".join(lines))
    comm.Barrier()
    given = {
        "tokenizer": str(folder / "tokenizer"),
        "chat_template": FOLDER / "chatml.jinja",
        "validation": 0.2,
        "shard_bytes": 8192,
    }
    parts = [folder / f"part-{number}.jsonl" for number in range(3)]
    prepare(options(parts, folder / "together", **given), comm, QUIET)
    if comm.rank == 0:
        prepare(options(parts, folder / "alone", **given), MPI.COMM_SELF, QUIET)
        hashes = [
            {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}
            for out in (folder / "together", folder / "alone")
        ]
        assert hashes[0] == hashes[1]
        assert sum(name.endswith(".h5") for name in hashes[0]) > 3
    verify(folder / "together", comm, QUIET)


def test_a_dataset_holds_the_learnt_part_and_its_template(tmp_path: Path) -> None:
    chats = [*conversations(20), [*say("Hi", "Hello."), *say("and what more?")]]
    manifest = made(tmp_path, chats)
    encoder = ChatEncoder(tokenizer(), template("chatml"))
    expected = {
        (tuple(ids.tolist()), tuple(learnt.tolist()))
        for ids, learnt in (learnt_part(encoder.tokens({"messages": chat})) for chat in chats)
    }
    with PairReader(manifest, "train") as reader:
        pairs = [reader.conversation(pair) for pair in range(21)]
    assert {(tuple(ids.tolist()), tuple(learnt.tolist())) for ids, learnt in pairs} == expected
    # A model stops at the end of a turn, not at the tokenizer's end of text.
    assert manifest.tokenizer["end_of_text"] == "<|im_end|>"
    loaded = Manifest.load(tmp_path / "out")
    assert isinstance(loaded, PairManifest)
    kept = loaded.load_template()
    assert kept is not None
    assert kept.render(say("Hi")) == template("chatml").render(say("Hi"))
    assert "chat_template.jinja" in loaded.files
    (tmp_path / "out/chat_template.jinja").write_text("x")
    with pytest.raises(DataError, match=r"chat_template\.jinja is damaged"):
        verify(tmp_path / "out", MPI.COMM_SELF, QUIET)


def test_the_preview_names_the_format_and_marks_what_is_learnt(tmp_path: Path, model: Path) -> None:
    records = [{"instruction": f"a{n}", "input": "", "output": f"b{n}"} for n in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    stream = StringIO()
    given = options(tmp_path / "a.json", tmp_path / "out", tokenizer=str(model))
    prepare(given, MPI.COMM_SELF, Console(stream=stream, watched=False))
    text = stream.getvalue()
    assert "format: alpaca (instruction, input, output), 5 records" in text
    assert "a.json record 1, learnt is what is marked:" in text
    assert "<|im_start|>assistant\n[[b0<|im_end|>]]" in text
    assert "[[b1<|im_end|>]]" in text
    assert "b2" not in text
    assert "of them learnt" in text


def test_columns_of_a_table_are_a_prompt_and_an_answer(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.csv").write_text("frage,antwort\nHi,Hello.\n1,2\n")
    named = {"source_field": "frage", "target_field": "antwort", "tokenizer": str(model)}
    manifest = prepare(options(tmp_path / "a.csv", tmp_path / "out", **named), MPI.COMM_SELF, QUIET)
    assert manifest.splits["train"].n_docs == 2
    del named["target_field"]
    text = refused(tmp_path / "a.csv", tmp_path / "b", **named)
    assert 'a.csv record 1 has no column "completion" (it has frage, antwort)' in text
    text = refused(tmp_path / "a.csv", tmp_path / "b", tokenizer=str(model))
    assert "a.csv record 1 has the columns frage, antwort, of which no format is known" in text


def test_wrong_conversations_are_refused_by_file_and_line(tmp_path: Path, model: Path) -> None:
    def lines(*records: dict[str, Any]) -> Path:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    good = {"messages": say("a", "b")}
    named = {"tokenizer": str(model)}
    place = "a.jsonl line 2"
    out = tmp_path / "out"
    empty = refused(lines(good, {"messages": say("a", " ")}), out, **named)
    assert f"{place} (byte " in empty
    assert "has an empty answer" in empty
    alone = refused(lines(good, {"messages": say("a")}), out, **named)
    assert "is a conversation without an answer of the assistant" in alone
    other = refused(lines(good, {"prompt": "a", "completion": "b"}), out, **named)
    assert "is no record of the format messages" in other
    assert "it has the columns prompt, completion" in other
    two = {"messages": [*say("a", "b"), *say("x", "c")[1:]]}
    roles = refused(lines(good, two), out, **named, chat_template=FOLDER / "mistral.jinja")
    assert place in roles
    assert "Conversation roles must alternate" in roles
    assert not out.exists()
    # The template writes tokens that the tokenizer does not have.
    text = refused(lines(good), out, tokenizer="bytes", chat_template=FOLDER / "chatml.jinja")
    assert "writes <|im_start|>, <|im_end|>, which the tokenizer bytes does not have" in text
    assert "there is none; give --tokenizer the folder" in refused(
        lines(good), out, tokenizer="bytes"
    )
    # Texts need no template.
    prepare(options(lines({"text": "a b"}), out, tokenizer="bytes"), MPI.COMM_SELF, QUIET)


def test_options_of_conversations_are_refused_for_other_pairs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--format 'x' is unknown"):
        options(tmp_path, tmp_path / "o", format="x").check()
    with pytest.raises(UsageError, match="--format is of conversations, and --task seq2seq has"):
        options(tmp_path, tmp_path / "o", format="alpaca", task="seq2seq").check()
    with pytest.raises(UsageError, match="--chat-template is of conversations"):
        options(tmp_path, tmp_path / "o", chat_template=tmp_path, task="causal-lm").check()


def test_parallel_texts_are_pairs_of_translation(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "a.de").write_text("eins\nzwei\n")
    given = {"task": "seq2seq", "tokenizer": "bytes"}
    files = [tmp_path / "a.en", tmp_path / "a.de"]
    manifest = prepare(options(files, tmp_path / "out", **given), MPI.COMM_SELF, QUIET)
    assert manifest.splits["train"].n_docs == 2
    (tmp_path / "a.de").write_text("eins\n")
    text = refused(files, tmp_path / "b", **given)
    assert "a.en record 2 is beyond the end of" in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_recognised(name: str, tmp_path: Path, model: Path) -> None:
    data = os.environ.get("MPILLM_TEST_DATA")
    path = Path(data or "") / name
    if not data or not path.exists():
        pytest.skip(f"needs {name} of LLaMA-Factory in MPILLM_TEST_DATA")
    records, form = PUBLISHED[name]
    manifest = prepare(options(path, tmp_path / "out", tokenizer=str(model)), MPI.COMM_SELF, QUIET)
    assert manifest.splits["train"].n_docs == records
    assert manifest.prep["format"] == form
