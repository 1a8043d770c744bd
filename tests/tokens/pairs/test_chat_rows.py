"""Rows of conversations: what is in them, and where a long one is cut."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.errors import DataError
from mpillm.system.console import Console
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.pairs.chat_rows import cut_place
from mpillm.tokens.pairs.pair_manifest import PairManifest
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.samples import RowShape
from tests.tokens.chat.templates import FOLDER, say, tokenizer

QUIET = Console(speaks=False)


def made(folder: Path, conversations: list[list[dict[str, str]]], **more: Any) -> PairManifest:
    """Prepare conversations with the tokenizer of the templates, in ChatML."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer/tokenizer.json").write_text(tokenizer().to_json())
    (folder / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": each}) + "\n" for each in conversations)
    )
    given = {
        "task": "chat",
        "tokenizer": str(folder / "tokenizer"),
        "chat_template": FOLDER / "chatml.jinja",
        "validation": 0.0,
        **more,
    }
    options = PrepareOptions((str(folder / "chats.jsonl"),), folder / "out", **given)
    manifest = prepare(options, MPI.COMM_SELF, QUIET)
    assert isinstance(manifest, PairManifest)
    return manifest


def shape(context: int, packed: bool) -> RowShape:
    return RowShape(context + 1, Lengths(context), packed)


def conversations(count: int) -> list[list[dict[str, str]]]:
    return [
        say(*(f"{number:x}" * (1 + (number * turn) % 40) for turn in range(2 + 2 * (number % 3))))
        for number in range(count)
    ]


def test_packed_rows_hold_each_conversation_once_an_epoch(tmp_path: Path) -> None:
    manifest = made(tmp_path, conversations(60))
    with PairReader(manifest, "train") as reader:
        whole = {tuple(reader.conversation(pair)[0].tolist()) for pair in range(60)}
        assert len(whole) == 60
        for packed in (True, False):
            row = shape(400, packed)
            steps = reader.steps(row, 1, 5)
            assert steps is reader.steps(row, 1, 5)
            count = len(steps.packing)
            assert (count < 30) if packed else (count == 60)
            found = []
            for step in range(count):
                raw = steps.raw(step, 0, 1)
                tokens, learnt = raw["tokens"][0], raw["supervised"][0]
                numbers = raw["documents"][0] if packed else np.zeros(401, int)
                [place] = steps.packing.rows(np.array([step]), 5).tolist()
                last = len(steps.packing.of_row(place))
                for number in range(last):
                    part = np.flatnonzero(numbers == number)
                    if not packed:
                        part = part[: int(np.flatnonzero(learnt)[-1]) + 1]
                    assert (np.diff(part) == 1).all()
                    assert learnt[part[0]] == 0
                    assert learnt[part[-1]] == 1
                    found.append(tuple(tokens[part].tolist()))
                # The padding is a document of its own, of which nothing is learnt.
                assert not packed or not learnt[numbers == last].any()
                assert numbers.max() <= last
            assert len(found) == 60
            assert set(found) == whole
            text = reader.describe(row, 2 * count)
            assert text == f"60 conversations in {count:,} rows of 400, read 2.00 times"


def test_rows_of_a_step_are_the_same_whoever_asks(tmp_path: Path) -> None:
    manifest = made(tmp_path, conversations(60))
    with PairReader(manifest, "train") as reader:
        steps = reader.steps(shape(200, True), 8, 5)
        for step in (0, 7):
            whole = steps.raw(step, 0, 8)
            parts = [steps.raw(step, first, count) for first, count in ((0, 3), (3, 1), (4, 4))]
            for name, rows in whole.items():
                assert (np.concatenate([part[name] for part in parts]) == rows).all()


def test_an_evaluation_takes_each_once_in_rows_as_long_as_needed(tmp_path: Path) -> None:
    manifest = made(tmp_path, conversations(50))
    with PairReader(manifest, "train") as reader:
        batches = reader.evaluation(shape(400, False), 8)
        total = 0
        for number, (rows, positions) in enumerate(batches.shapes):
            raw = batches.raw(number)
            assert raw["tokens"].shape == raw["supervised"].shape == (rows, positions + 1)
            assert raw["keys"].shape == (rows,)
            assert raw["supervised"][:, -1].any()
            total += int(raw["supervised"].sum())
        assert sum(rows for rows, _ in batches.shapes) == 50
        assert total == sum(int(reader.conversation(pair)[1].sum()) for pair in range(50))


def test_a_long_conversation_ends_after_its_last_whole_answer() -> None:
    learnt = np.array([0, 0, 1, 1, 0, 0, 1, 1, 1], np.uint8)
    assert cut_place(learnt, 8) == (4, True)
    assert cut_place(learnt, 4) == (4, True)
    # No whole answer: as much of the first one as fits.
    assert cut_place(learnt, 3) == (3, False)
    assert cut_place(learnt, 2) == (0, False)


def test_cuts_are_counted(tmp_path: Path) -> None:
    chats = [
        say("a", "b", "c", "d" * 300),
        say("a" * 300, "b"),
        say("a", "b" * 300),
        say("a", "b"),
    ]
    manifest = made(tmp_path, chats)
    with PairReader(manifest, "train") as reader:
        assert reader.describe_cuts(shape(150, True)) == (
            "cut off: 3 of 4 conversations are longer than a row: 1 end after a whole answer, "
            "1 within one, 1 are left out, as no answer begins in a row"
        )
        assert not reader.describe_cuts(shape(999, True))
        rows = reader.steps(shape(150, False), 1, 0)
        assert len(rows.packing) == 3
        lengths = [int(np.flatnonzero(rows.raw(n, 0, 1)["supervised"])[-1]) + 1 for n in range(3)]
        assert sorted(lengths)[-1] == 151
        with pytest.raises(DataError, match="no conversation of the train split"):
            reader.steps(shape(20, True), 1, 0)
