"""Datasets of pairs: what is written, and that it is the same at any number of ranks."""

import hashlib
import json
import re
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from mpi4py import MPI
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, processors

from mpillm.errors import DataError, UsageError
from mpillm.system.console import Console
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.losses import LossCheck
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.pairs import prepare_pairs
from mpillm.tokens.pairs.pair_manifest import PairManifest
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.pairs.pair_records import PairEncoder, read_records
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.samples import RowShape
from mpillm.tokens.sources import SourcePiece
from mpillm.tokens.tokenizer import byte_tokenizer
from mpillm.tokens.verify import verify
from mpillm.tokens.work_folder import taken_over

QUIET = Console(speaks=False)
SETS = "multi-label-classification"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "two", "three", "##s", "four"]


def write_lines(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def bert(path: Path) -> Path:
    """A WordPiece tokenizer that closes a text by [CLS] … [SEP]."""
    inner = Library(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    inner.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inner.save(str(path))
    return path


def options(source: Path, out: Path, task: str, **more: object) -> PrepareOptions:
    given = {"tokenizer": "bytes", "validation": 0.0, **more}
    return PrepareOptions((str(source),), out, task=task, **given)


def made(source: Path, out: Path, task: str, **more: object) -> PairManifest:
    manifest = prepare(options(source, out, task, **more), MPI.COMM_SELF, QUIET)
    assert isinstance(manifest, PairManifest)
    return manifest


def rows_of(manifest: PairManifest, context: int, source: int) -> dict[str, np.ndarray]:
    """All pairs of the training split, padded."""
    with PairReader(manifest, "train") as reader:
        row = RowShape(0, Lengths(context, source))
        return reader.read(np.arange(reader.n_pairs), row)


def translations(count: int) -> list[dict[str, object]]:
    words = [f"{number:x}" * (1 + number % 5) for number in range(count)]
    return [{"source": word, "target": word.upper() + "!"} for word in words]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_bytes_are_the_same_at_any_number_of_ranks(
    folder: Path, comm: MPI.Intracomm, tokenizer: str
) -> None:
    source = folder / "pairs.jsonl"
    if comm.rank == 0:
        write_lines(source, translations(900))
        # Sources are cut at 16 MiB: a second file is a piece of its own.
        write_lines(folder / "more.jsonl", translations(100)[50:])
    comm.Barrier()
    given = {"tokenizer": tokenizer, "validation": 0.2, "shard_bytes": 4096, "vocab_size": 300}
    prepare(options(folder, folder / "together", "seq2seq", **given), comm, QUIET)
    if comm.rank == 0:
        made(folder, folder / "alone", "seq2seq", **given)
        hashes = [
            {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}
            for out in (folder / "together", folder / "alone")
        ]
        assert hashes[0] == hashes[1]
        assert sum(name.endswith(".h5") for name in hashes[0]) > 3
    verify(folder / "together", comm, QUIET)
    # Prepared again, it is found.
    again = prepare(options(folder, folder / "together", "seq2seq", **given), comm, QUIET)
    assert sum(split.n_docs for split in again.splits.values()) == 950


def test_pairs_come_back_padded_and_cut(tmp_path: Path) -> None:
    records = translations(40)
    manifest = made(write_lines(tmp_path / "a.jsonl", records), tmp_path / "out", "seq2seq")
    raw = rows_of(manifest, 4, 10)
    seen = set()
    for row in range(40):
        source = bytes(raw["source"][row, : raw["source_lengths"][row]].astype(np.uint8)).decode()
        target = raw["target"][row, : raw["target_lengths"][row]].tolist()
        expected = [*(source.upper() + "!").encode(), 256][:4]
        assert target == expected
        assert not raw["target"][row, len(expected) :].any()
        seen.add(source)
    assert seen == {record["source"] for record in records}
    with PairReader(manifest, "train") as reader:
        cuts = reader.describe_cuts(RowShape(0, Lengths(4, 10)))
        longer = sum(len(str(record["target"])) + 1 > 4 for record in records)
        assert cuts == f"cut off: {longer} of 40 targets at 4; raise the model's lengths"
        assert not reader.describe_cuts(RowShape(0, Lengths(40, 40)))


def test_rows_are_as_short_as_the_batch_allows(tmp_path: Path) -> None:
    records = [{"text": "ab" * (1 + n % 15), "label": "xy"[n % 2]} for n in range(30)]
    source = write_lines(tmp_path / "a.jsonl", records)
    manifest = made(source, tmp_path / "out", "sequence-classification")
    row = RowShape(0, Lengths(40, 40, trims=True))
    with PairReader(manifest, "train") as reader:
        steps, whole = reader.steps(row, 2, 3), reader.steps(RowShape(0, Lengths(40, 40)), 2, 3)
        found = set()
        for step in range(15):
            raw, padded = steps.raw(step, 0, 2), whole.raw(step, 0, 2)
            longest = int(raw["source_lengths"].max())
            length = min(40, -(-longest // 8) * 8)
            assert raw["source"].shape == (2, length)
            assert np.array_equal(raw["source"], padded["source"][:, :length])
            assert padded["source"].shape == (2, 40)
            # Ranks that read a part of the batch have rows of the same length.
            assert np.array_equal(steps.raw(step, 1, 1)["source"], raw["source"][1:])
            found.add(length)
        assert len(found) > 1
        batches = reader.evaluation(row, 7)
        assert [shape[0] for shape in batches.shapes] == [7, 7, 7, 7, 2]
        for number, (rows, length) in enumerate(batches.shapes):
            assert batches.raw(number)["source"].shape == (rows, length)


def test_h5py_reads_a_shard(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(write_lines(tmp_path / "a.jsonl", translations(9)), out, "seq2seq")
    with h5py.File(out / "train-00000.h5") as file:
        first = file["source"][: file["source_ends"][0]]
        target = file["target"][: file["target_ends"][0]]
        assert (
            bytes(first.astype(np.uint8)).decode().upper() + "!"
            == bytes(target[:-1].astype(np.uint8)).decode()
        )
        assert dict(file.attrs)["format"] == "mpillm.pairs"


def test_an_epoch_has_each_pair_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    manifest = made(
        write_lines(tmp_path / "a.jsonl", translations(30)), tmp_path / "out", "seq2seq"
    )
    with PairReader(manifest, "train") as reader:
        steps = reader.steps(RowShape(0, Lengths(8, 8)), 10, 3)
        epochs: list[list[tuple[int, ...]]] = [[], []]
        for step in range(6):
            epochs[step // 3] += map(tuple, steps.raw(step, 0, 10)["source"].tolist())
        assert len(set(epochs[0])) == len(set(epochs[1])) == 30
        assert set(epochs[0]) == set(epochs[1])
        assert epochs[0] != epochs[1]
        part, whole = steps.raw(4, 6, 3), steps.raw(4, 0, 10)
        assert all((part[name] == whole[name][6:9]).all() for name in whole)
        batches = reader.evaluation(RowShape(0, Lengths(8, 8)), 7)
        assert batches.shapes == [(7, 8)] * 4 + [(2, 8)]
        assert (batches.raw(1)["keys"] != batches.raw(2)["keys"]).all()


def test_a_post_processor_closes_texts_and_words_are_labelled_at_their_first_token(
    tmp_path: Path,
) -> None:
    file = bert(tmp_path / "tokenizer.json")
    given = {"tokenizer": str(file), "end_of_text": "[SEP]"}
    records = [{"tokens": ["ones", "two", "threes"], "tags": ["B", "O", "B"]}]
    source = write_lines(tmp_path / "a.jsonl", records)
    manifest = made(source, tmp_path / "words", "token-classification", **given)
    assert manifest.classes == ("B", "O")
    raw = rows_of(manifest, 8, 8)
    assert raw["source"].tolist() == [[2, 4, 7, 5, 6, 7, 3, 0]]
    assert raw["labels"].tolist() == [[-1, 0, -1, 1, 0, -1, -1, -1]]
    # A text that is cut keeps its [SEP].
    cut = rows_of(manifest, 4, 4)
    assert cut["source"].tolist() == [[2, 4, 7, 3]]
    assert cut["labels"].tolist() == [[-1, 0, -1, -1]]
    source = write_lines(tmp_path / "b.jsonl", [{"text": "two ones", "label": 2}])
    manifest = made(source, tmp_path / "texts", "sequence-classification", **given)
    assert manifest.classes == ("0", "1", "2")
    raw = rows_of(manifest, 6, 6)
    assert raw["source"].tolist() == [[2, 5, 4, 7, 3, 0]]
    assert (raw["source_lengths"].tolist(), raw["label"].tolist()) == ([5], [2])


def test_numbers_and_sets_of_classes_come_from_lines_and_from_tables(tmp_path: Path) -> None:
    records = [{"text": "ab", "labels": ["x", "z", "x"]}, {"text": "cd", "labels": []}]
    sets = made(write_lines(tmp_path / "a.jsonl", records), tmp_path / "a", SETS)
    (tmp_path / "b.csv").write_text('text,labels\nab,"z, x"\ncd,\n')
    table = made(tmp_path / "b.csv", tmp_path / "b", SETS)
    for manifest in (sets, table):
        assert manifest.classes == ("x", "z")
        raw = rows_of(manifest, 6, 6)
        # The hash of the contents orders them.
        found = dict(zip(raw["source"][:, 0].tolist(), raw["classes"].tolist(), strict=True))
        assert found == {ord("a"): [1.0, 1.0], ord("c"): [0.0, 0.0]}
    (tmp_path / "c.tsv").write_text("text\tlabel\nab\t-2.5\ncd\t1e3\n")
    raw = rows_of(made(tmp_path / "c.tsv", tmp_path / "c", "regression"), 6, 6)
    assert raw["number"].dtype == np.float32
    assert sorted(raw["number"].tolist()) == [-2.5, 1000.0]
    path = write_lines(tmp_path / "none.jsonl", [{"text": "a", "labels": []}])
    with pytest.raises(DataError, match='no record has a label in "labels"'):
        made(path, tmp_path / "none", SETS)


def test_pictures_of_lists_and_arrays(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    colours = chance.integers(0, 256, (4, 5, 3), np.uint8)
    np.save(tmp_path / "a.npy", colours)
    records = [
        {"image": "a.npy", "label": "cat"},
        {"image": colours[::-1].tolist(), "label": "dog"},
    ]
    source = write_lines(tmp_path / "a.jsonl", records)
    manifest = made(source, tmp_path / "out", "image-classification")
    assert manifest.pairs.item == (3, 4, 5)
    raw = rows_of(manifest, 1, 1)
    by_class = dict(zip(raw["label"].tolist(), raw["pixels"], strict=True))
    assert (by_class[0] == colours.transpose(2, 0, 1)).all()
    assert (by_class[1] == colours[::-1].transpose(2, 0, 1)).all()
    write_lines(source, [*records, {"image": [[0.5]], "label": "dog"}])
    with pytest.raises(DataError, match=r"a.jsonl line 3 .*shape \[1, 1, 1\].*make all pictures"):
        made(source, tmp_path / "other", "image-classification")


def test_a_file_that_changed_is_noticed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 4), np.uint8))
    source = write_lines(tmp_path / "a.jsonl", [{"image": "a.npy", "label": 0}])
    made(source, tmp_path / "out", "image-classification")
    made(source, tmp_path / "out", "image-classification")
    # All pictures have one size: their bytes differ.
    np.save(tmp_path / "a.npy", np.ones((4, 4), np.uint8))
    with pytest.raises(UsageError, match=r"prepared otherwise .*content"):
        made(source, tmp_path / "out", "image-classification")


def test_what_is_no_text_is_replaced_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"tokens": ["a\ud800b", "c"], "tags": ["x\udc00", "y"]}]
    source = write_lines(tmp_path / "a.jsonl", records)
    source.write_bytes(source.read_bytes().replace(b'"c"', b'"\xff"'))
    console = Console(speaks=True)
    manifest = prepare(
        options(source, tmp_path / "out", "token-classification"), MPI.COMM_SELF, console
    )
    assert manifest.classes == ("x\ufffd", "y")
    assert isinstance(manifest, PairManifest)
    [row] = rows_of(manifest, 9, 9)["source"].tolist()
    assert bytes(row[:9]).decode() == "a\ufffdb \ufffd"
    said = capsys.readouterr()
    text = " ".join((said.out + said.err).split())
    assert "1 place aren't UTF-8 and were replaced by U+FFFD" in text
    assert "halves of characters in JSON (escapes such as \\ud83d, 2 places)" in text


def test_a_label_that_came_between_two_readings_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a", "label": "new"}])
    piece = SourcePiece(0, str(path), 0, path.stat().st_size, lines=True)
    records = [*read_records(piece, "sequence-classification", ("text", "label"))]
    tokenizer = byte_tokenizer()
    encoder = PairEncoder("sequence-classification", tokenizer, ("old",), LossCheck(tokenizer))
    with ThreadPoolExecutor(1) as pool, pytest.raises(DataError, match=r"line 1 .*label 'new'"):
        encoder.encode(records, pool)


def test_targets_end_once(tmp_path: Path) -> None:
    file = bert(tmp_path / "tokenizer.json")
    given = {"tokenizer": str(file), "end_of_text": "[SEP]"}
    source = write_lines(tmp_path / "a.jsonl", [{"source": "one", "target": "two ones"}])
    raw = rows_of(made(source, tmp_path / "both", "seq2seq", **given), 6, 6)
    assert raw["target"].tolist() == [[2, 5, 4, 7, 3, 0]]
    # A post-processor that only begins a text does not end it.
    spec = json.loads(file.read_text())
    spec["post_processor"]["single"].pop()
    file.write_text(json.dumps(spec))
    raw = rows_of(made(source, tmp_path / "begun", "seq2seq", **given), 6, 6)
    assert raw["target"].tolist() == [[2, 5, 4, 7, 3, 0]]
    assert raw["source"].tolist() == [[2, 4, 0, 0, 0, 0]]


WRONG = {
    '{"source": "a"}': r'a.jsonl line 2 .* has no field "target" \(it has source\)',
    '{"source": "a", "target": 3}': r'line 2 .* has no text in "target"',
    '{"source": "a", "target": " "}': r'line 2 .* has no text in "target"',
    '["a", "b"]': "line 2 .* is no JSON object",
    '{"source": ': "line 2 .* isn't JSON",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_record_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(translations(1)[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=WRONG[line]):
        made(path, tmp_path / "out", "seq2seq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "record", "words"),
    [
        ("sequence-classification", {"text": "a", "label": -1}, "has no label"),
        ("sequence-classification", {"text": "a", "label": True}, "has no label"),
        ("regression", {"text": "a", "label": "high"}, r"no number .*\(it is 'high'\)"),
        ("regression", {"text": "a", "label": "nan"}, "no number"),
        ("regression", {"text": "a", "label": 1e39}, "write a finite one"),
        ("regression", {"text": "a", "label": True}, "no number"),
        ("regression", {"text": "a", "label": None}, 'no field "label"'),
        ("regression", {"text": "a"}, r'no field "label" \(it has text\)'),
        ("multi-label-classification", {"text": "a", "labels": [1.5]}, "has no label"),
        ("multi-label-classification", {"text": "a", "labels": None}, 'no field "labels"'),
        ("token-classification", {"tokens": ["a"], "tags": []}, "as many labels"),
        ("token-classification", {"tokens": [" "], "tags": [1]}, "that is no word"),
        ("image-classification", {"image": [[1], [2, 3]], "label": 0}, "not equally long"),
        ("image-classification", {"image": "b.npy", "label": 0}, "cannot be read"),
        ("image-classification", {"image": 3, "label": 0}, "neither a path nor lists"),
        ("ctc", {"audio": "b.wav", "text": "a"}, "names a file that cannot be read"),
    ],
)
def test_wrong_values_are_named(
    tmp_path: Path, task: str, record: dict[str, object], words: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [record])
    with pytest.raises(DataError, match=rf"a.jsonl line 1 .*{words}"):
        made(path, tmp_path / "out", task)


def test_mixed_labels_and_options_of_text_are_refused(tmp_path: Path) -> None:
    records = [{"text": "a", "label": 1}, {"text": "b", "label": "x"}]
    path = write_lines(tmp_path / "a.jsonl", records)
    with pytest.raises(DataError, match="some labels are numbers, such as 1, and others texts"):
        made(path, tmp_path / "out", "sequence-classification")
    with pytest.raises(UsageError, match="--field names a field of text"):
        made(path, tmp_path / "out", "seq2seq", field="body")
    with pytest.raises(UsageError, match="--source-field and --target-field are of pairs"):
        options(path, tmp_path / "out", "masked-lm", source_field="a").check()
    with pytest.raises(UsageError, match="--task 'seq' is unknown; tasks: causal-lm"):
        options(path, tmp_path / "out", "seq").check()
    (tmp_path / "b.txt").write_text("plain\n")
    with pytest.raises(UsageError, match=r"b.txt holds no JSON records"):
        made(tmp_path / "b.txt", tmp_path / "out", "seq2seq")


def test_a_full_disk_and_a_folder_taken_over_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", translations(500))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(DataError, match=r"File too large.*the 500 pairs are there twice"):
            made(path, tmp_path / "out", "seq2seq")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    encode = prepare_pairs._encode

    def removed(found: Any, encoder: Any, given: Any, file: Path) -> Any:
        shutil.rmtree(file.parent)
        return encode(found, encoder, given, file)

    monkeypatch.setattr(prepare_pairs, "_encode", removed)
    with pytest.raises(DataError, match=re.escape(taken_over(tmp_path / "out"))):
        made(path, tmp_path / "out", "seq2seq")


def test_damage_is_found(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(write_lines(tmp_path / "a.jsonl", translations(20)), out, "seq2seq")
    shard, manifest = out / "train-00000.h5", json.loads((out / "manifest.json").read_text())
    offset = manifest["splits"]["train"]["shards"][0]["source_offset"]
    data = bytearray(shard.read_bytes())
    data[offset : offset + 2] = b"\xff\xff"
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"train-00000.h5 is damaged: its hash"):
        verify(out, MPI.COMM_SELF, QUIET)
    loaded = Manifest.load(out)
    assert isinstance(loaded, PairManifest)
    with pytest.raises(DataError, match=r"pair 0 of the train split has an id .*--verify"):
        rows_of(loaded, 8, 8)
    shard.write_bytes(data[:-5])
    with pytest.raises(DataError, match="cut short"):
        rows_of(loaded, 8, 8)


def test_tables_are_checked_as_a_shard_is_opened(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_lines(tmp_path / "a.jsonl", [{"image": [[n, n]], "label": 0} for n in range(6)])
    manifest = made(path, out, "image-classification")
    shard = out / manifest.split("train").shards[0].file
    whole = shard.read_bytes()
    data = bytearray(whole)
    # In order still: the first picture would be the second.
    data[manifest.split("train").shards[0].target_ends_offset] = 2
    shard.write_bytes(data)
    with pytest.raises(DataError, match="is damaged outside /source and /target"):
        rows_of(manifest, 1, 1)
    shard.write_bytes(whole)
    # Another dataset with as many bytes and equal tables.
    write_lines(path, [{"image": [[n, 9]], "label": 0} for n in range(6)])
    made(path, out, "image-classification", overwrite=True)
    assert shard.stat().st_size == len(whole)
    with pytest.raises(DataError, match="another dataset is there now"):
        rows_of(manifest, 1, 1)


def shard_of(manifest: dict[str, Any]) -> dict[str, Any]:
    shard: dict[str, Any] = manifest["splits"]["train"]["shards"][0]
    return shard


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["pairs"].update(kind="poems"), "pairs.kind should be one of chat, preference"),
        (lambda m: m["pairs"].update(closed=1), "pairs.closed should be true or false"),
        (lambda m: m["pairs"].update(item=[3]), "pairs.item should be a list of 0 numbers"),
        (lambda m: m["pairs"].update(source_dtype="<O8"), "pairs.source_dtype should be <u2 or"),
        (lambda m: m["splits"]["train"]["shards"][0].update(n_source=1 << 62), "n_tokens should"),
        (
            lambda m: m["splits"]["train"]["shards"][0].update(target_offset=1 << 40),
            "beyond its end",
        ),
        (lambda m: m["splits"]["train"]["shards"][0].update(file="../a.h5"), "a plain file name"),
        (lambda m: m.pop("pairs"), "pairs should be an object"),
        (lambda m: m["prep"].update(seed=9), "is damaged: its digest"),
    ],
)
def test_a_manifest_is_checked_at_the_door(tmp_path: Path, change: object, words: str) -> None:
    out = tmp_path / "out"
    made(write_lines(tmp_path / "a.jsonl", translations(20)), out, "seq2seq")
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)  # type: ignore[operator]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=words):
        Manifest.load(out)
