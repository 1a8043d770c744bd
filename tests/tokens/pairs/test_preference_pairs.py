"""Datasets of preferences: the same bytes at any number of ranks, rows, preview, refusals."""

import csv
import hashlib
import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.errors import MpillmError
from mpillm.system.console import Console
from mpillm.tokens.pairs.pair_manifest import PairManifest
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.verify import verify
from tests.tokens.chat.templates import FOLDER, tokenizer
from tests.tokens.pairs.test_chat_rows import shape

QUIET = Console(speaks=False)
PAIRS = [
    {"prompt": f"ask {n}", "chosen": "good" + " yes" * (n % 3), "rejected": f"bad {n:x}"}
    for n in range(60)
]
LABELLED = [
    {"prompt": f"ask {n}", "completion": f"answer {n}", "label": n % 2 == 0} for n in range(20)
]


def options(folder: Path, sources: list[Path], out: str, **more: Any) -> PrepareOptions:
    (folder / "tokenizer.json").write_text(tokenizer().to_json())
    given = {
        "task": "preference",
        "tokenizer": str(folder / "tokenizer.json"),
        "chat_template": FOLDER / "chatml.jinja",
        "validation": 0.0,
        **more,
    }
    return PrepareOptions(tuple(map(str, sources)), folder / out, **given)


def made(folder: Path, records: list[dict[str, Any]], **more: Any) -> PairManifest:
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    manifest = prepare(options(folder, [path], "out", **more), MPI.COMM_SELF, QUIET)
    assert isinstance(manifest, PairManifest)
    return manifest


def test_the_bytes_are_the_same_at_any_number_of_ranks(folder: Path, comm: MPI.Intracomm) -> None:
    parts = [folder / f"part-{number}.jsonl" for number in range(3)]
    if comm.rank == 0:
        for number, part in enumerate(parts):
            part.write_text("\n".join(json.dumps(each) for each in PAIRS[number::3]))
        prepare(options(folder, parts, "alone", validation=0.2), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    given = options(folder, parts, "together", validation=0.2)
    comm.Barrier()
    prepare(given, comm, QUIET)
    if comm.rank == 0:
        hashes = [
            {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}
            for out in (folder / "together", folder / "alone")
        ]
        assert hashes[0] == hashes[1]
    verify(folder / "together", comm, QUIET)


@pytest.mark.parametrize("packed", [True, False])
def test_rows_hold_both_answers_of_a_pair_apart(packed: bool, tmp_path: Path) -> None:
    manifest = made(tmp_path, PAIRS)
    expected = {(f"{each['prompt']}", each["chosen"], each["rejected"]) for each in PAIRS}
    found = set()
    with PairReader(manifest, "train") as reader:
        reader.references = np.arange(120.0).reshape(60, 2)
        steps = reader.steps(shape(200, packed), 1, 5)
        assert (len(steps.packing) < 40) if packed else (len(steps.packing) == 60)
        for step in range(len(steps.packing)):
            raw = {name: each[0] for name, each in steps.raw(step, 0, 1).items()}
            numbers = raw["documents"]
            last = int(numbers.max())
            # A row that is full has no padding, which would be numbered after the answers.
            assert last % 2 or not raw["supervised"][numbers == last].any()
            for first in range(0, last + last % 2, 2):
                texts = []
                for side in (0, 1):
                    part = numbers == first + side
                    tokens, learnt = raw["tokens"][part], raw["supervised"][part]
                    assert (raw["rejected"][part] == side).all()
                    # The reference is at the first token.
                    assert raw["reference"][part][0] % 2 == side
                    assert not raw["reference"][part][1:].any()
                    texts.append(tokenizer().decode_rendered(tokens[learnt == 1]))
                    prompt = tokenizer().decode_rendered(tokens[learnt == 0])
                answers = [text.removesuffix("<|im_end|>") for text in texts]
                asked = prompt.partition("user\n")[2].partition("<|im_end|>")[0]
                found.add((asked, *answers))
    assert found == expected


def test_prompts_are_joined_with_the_answers_of_others(tmp_path: Path) -> None:
    manifest = made(tmp_path, LABELLED)
    assert manifest.pairs.kind == "kto"
    with PairReader(manifest, "train") as reader:
        texts, asked = [], []
        for pair in range(reader.n_pairs):
            ids, marks = reader.mismatched.conversation(pair)
            assert len(ids) == reader.mismatched.lengths()[pair]
            assert set(marks.tolist()) == {0, 1}
            text = tokenizer().decode_rendered(ids)
            asked.append(text.partition("ask ")[2].partition("<")[0])
            texts.append(text.partition("answer ")[2].partition("<")[0])
        assert sorted(texts) == sorted(asked)
        assert texts == asked[1:] + asked[:1]
        labels = [int(reader.conversation(pair)[1].max()) for pair in range(reader.n_pairs)]
    assert sorted(labels) == [1] * 10 + [3] * 10


def test_the_preview_shows_both_answers(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows(PAIRS[:3])
    stream = StringIO()
    given = options(tmp_path, [tmp_path / "a.csv"], "out")
    prepare(given, MPI.COMM_SELF, Console(stream=stream, watched=False))
    text = stream.getvalue()
    assert "format: preference (prompt, conversations or instruction, with chosen and" in text
    assert "a.csv record 1, chosen, learnt is what is marked:" in text
    assert "assistant\n[[good<|im_end|>]]" in text
    assert "a.csv record 1, rejected, learnt is what is marked:" in text
    assert "assistant\n[[bad 0<|im_end|>]]" in text


@pytest.mark.parametrize(
    ("records", "more", "message"),
    [
        ([{"a": "x", "b": "y"}], {}, r"record 1 has the columns a, b, which no format of pref"),
        ([PAIRS[0], {**PAIRS[1], "chosen": "x", "rejected": "x"}], {}, "record 2 has the same"),
        (LABELLED[::2], {}, "all 10 records have an answer that is desirable: KTO learns from"),
        (PAIRS, {"task": "kto"}, "is no record of the format kto"),
        (PAIRS, {"task": "chat"}, "are no chat; prepare them by --task preference"),
        (PAIRS, {"source_field": "prompt"}, "reads a prompt and its answers by the names"),
        (PAIRS, {"format": "alpaca"}, "is of --task chat; formats of --task preference: pref"),
        (PAIRS, {"task": "dpo", "chat_template": None}, "prepare them by --task preference"),
    ],
)
def test_wrong_input_is_refused(
    records: list[dict[str, Any]], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MpillmError, match=message):
        made(tmp_path, records, **more)
    assert not (tmp_path / "out").exists()
