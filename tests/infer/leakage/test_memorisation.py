"""Planted secrets that a small model does reproduce, and text that it does not know."""

import json
import random
import string
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpillm.errors import DataError, MismatchError, UsageError
from mpillm.infer.leakage.memorisation import (
    Memorisation,
    Passage,
    Reproduction,
    passage_tokens,
    reproduce,
    sample_passages,
    share_interval,
)
from mpillm.infer.leakage.print_memorisation import MemorisationSettings, print_memorisation
from mpillm.infer.loading import load_trained
from mpillm.models.decoder import DecoderConfig
from mpillm.models.encoder import EncoderConfig
from mpillm.system.console import Console
from mpillm.tokens.pairs.pair_reader import PairReader, open_of
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.reader import open_split
from mpillm.train.recipe import parse_recipe
from mpillm.train.setup import train
from tests.tokens.pairs.test_chat_rows import conversations, made

QUIET = Console(speaks=False)
SECRETS, LETTERS = 4, string.ascii_letters + string.digits
LENGTHS = 8, 12


def secrets() -> list[str]:
    """Texts of 24 characters by chance, which no rule predicts."""
    chance = random.Random(11)
    return ["".join(chance.sample(LETTERS, 24)) for _ in range(SECRETS)]


@pytest.fixture(scope="module")
def overfitted(shared_folder: Path, comm: MPI.Intracomm) -> Path:
    """Train on 4 secrets, each many times, until they are known by heart."""
    folder = shared_folder / "memorisation"
    if comm.rank == 0:
        folder.mkdir()
        # A secret ends some dozens of documents: equal documents alone would be of one split.
        texts = [f"{number:03d}{each}" for number in range(40) for each in secrets()]
        chance = random.Random(2)
        texts += ["".join(chance.choices("qrstuvwxyz", k=27)) for _ in range(20)]
        rows = "".join(json.dumps({"text": each}) + "\n" for each in texts)
        (folder / "secrets.jsonl").write_text(rows)
    comm.Barrier()
    out = folder / "data"
    source = (str(folder / "secrets.jsonl"),)
    prepare(PrepareOptions(source, out, tokenizer="bytes", validation=0.2), comm, QUIET)
    table = {
        "model": {"layers": 1, "width": 48, "heads": 4, "context": 28},
        "data": {"path": str(out)},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5},
        "train": {"run": str(folder / "run"), "sinks": [], "steps": 200, "batch": 24},
    }
    train(parse_recipe(table, "test"), comm, QUIET)
    return folder / "run"


def test_secrets_are_found_and_unknown_text_is_not(
    overfitted: Path, folder: Path, comm: MPI.Intracomm, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(5)
    unknown = ["".join(chance.sample(LETTERS, 24)) for _ in range(8)]
    texts = folder / "texts.txt"
    if comm.rank == 0:
        texts.write_text("\n".join([*secrets(), "", *unknown]) + "\n")
    comm.Barrier()
    outputs = folder / "copied.jsonl"
    asked = MemorisationSettings(prompt=8, tokens=16, texts=texts, outputs=outputs, as_json=True)
    print_memorisation(overfitted, None, asked, comm, Console(speaks=comm.rank == 0), "cpu")
    rows = [json.loads(line) for line in outputs.read_text().splitlines()]
    assert [row["place"] for row in rows] == [*range(1, 5), *range(6, 14)]
    assert [row["whole"] for row in rows] == [True] * 4 + [False] * 8
    assert all(row["output"] == secret[8:] for row, secret in zip(rows, secrets(), strict=False))
    if comm.rank == 0:
        figures = json.loads(capsys.readouterr().out)["texts"]
        assert figures["n"] == 12
        assert figures["whole_share"] == pytest.approx(1 / 3)
        assert figures["longest"] == 16


def test_drawn_passages_are_within_documents_and_the_same_at_any_number_of_ranks(
    overfitted: Path, comm: MPI.Intracomm
) -> None:
    loaded = load_trained(overfitted, comm, QUIET)
    data = overfitted.parent / "data"
    with open_split(data) as reader:
        passages = sample_passages(reader, 30, LENGTHS, 1)
        assert sample_passages(reader, 30, LENGTHS, 1) == passages
        assert sample_passages(reader, 30, LENGTHS, 2) != passages
        with pytest.raises(DataError, match="no document of 60 tokens or more; lower"):
            sample_passages(reader, 30, (30, 30), 1)
        tokens = np.empty(reader.n_tokens, reader.dtype)
        reader.read(0, tokens)
        ends = {
            int(end) for shard in range(len(reader.firsts) - 1) for end in reader.doc_ends(shard)
        }
    assert 0 < len(passages) <= 30
    for each in passages:
        own = range(each.place, each.place + sum(LENGTHS))
        assert [*each.prompt, *each.expected] == tokens[own.start : own.stop].tolist()
        assert not ends & set(own[1:])
    found = reproduce(loaded.model, passages, comm, QUIET)
    assert found == reproduce(loaded.model, passages, MPI.COMM_SELF, QUIET)
    # The plain way: the whole text again for each token, one passage after the other.
    for each in found[:5]:
        ids = list(each.passage.prompt)
        with torch.inference_mode():
            for _ in each.passage.expected:
                ids.append(int(loaded.model(torch.tensor([ids]))[0, -1].argmax()))
        assert ids[LENGTHS[0] :] == each.written
    with open_split(data, "validation") as reader:
        held_out = sample_passages(reader, 30, LENGTHS, 1)
    figures = Memorisation.of(found)
    assert figures.n == len(passages)
    assert figures.mean_copied == np.mean([each.copied for each in found])
    assert figures.whole_share == np.mean([each.whole for each in found])
    assert len(held_out) > 0


@pytest.mark.usefixtures("processes")
def test_of_conversations_the_beginnings_are_drawn(tmp_path: Path) -> None:
    manifest = made(tmp_path, conversations(60))
    with open_of(manifest, "train") as reader:
        assert isinstance(reader, PairReader)
        lengths = reader.lengths()
        whole = int(np.median(lengths))
        passages = sample_passages(reader, 20, (whole - 3, 3), 4)
        assert passages == sample_passages(reader, 20, (whole - 3, 3), 4)
        assert len({each.place for each in passages}) == 20
        for each in passages:
            assert lengths[each.place] >= whole
            ids = reader.conversation(each.place)[0][:whole].tolist()
            assert [*each.prompt, *each.expected] == ids


def test_what_is_copied_ends_at_the_first_difference() -> None:
    def copied(written: list[int]) -> tuple[int, bool]:
        each = Reproduction(Passage(0, 0, [1], [5, 6, 7]), written)
        return each.copied, each.whole

    assert copied([5, 6, 7]) == (3, True)
    assert copied([5, 9, 7]) == (1, False)
    assert copied([9, 6, 7]) == (0, False)
    assert copied([5, 6]) == (2, False)


def test_the_interval_of_a_share_holds_it_about_as_often_as_it_says() -> None:
    for of, share in ((30, 0.1), (100, 0.5), (400, 0.02)):
        covered = 0.0
        for count in range(of + 1):
            low, high = share_interval(count, of)
            assert 0 <= low <= count / of <= high <= 1
            if low <= share <= high:
                covered += comb(of, count) * share**count * (1 - share) ** (of - count)
        assert 0.92 < covered < 0.99


def test_wrong_input_is_refused(overfitted: Path, folder: Path, comm: MPI.Intracomm) -> None:
    decoder = DecoderConfig(layers=1, width=8, heads=1, context=30, vocab_size=9)
    assert passage_tokens(decoder, None, None) == (15, 15)
    assert passage_tokens(decoder, 11, 20) == (11, 20)
    with pytest.raises(UsageError, match="beyond the model's context of 30"):
        passage_tokens(decoder, 20, 12)
    encoder = EncoderConfig(layers=1, width=8, heads=1, context=30, vocab_size=9)
    with pytest.raises(MismatchError, match="models that continue a text"):
        passage_tokens(encoder, None, None)
    texts = folder / "texts.txt"
    if comm.rank == 0:
        texts.write_text("long enough for it\nshort\n")
    comm.Barrier()
    for file, prompt, message in (
        (texts, 8, "line 2 of .* has 5 tokens, and a prompt takes 8"),
        (folder / "none", 8, "--texts: "),
    ):
        asked = MemorisationSettings(prompt=prompt, texts=file)
        with pytest.raises(UsageError, match=message):
            print_memorisation(overfitted, None, asked, comm, QUIET, "cpu")
