"""Pairs of a split by number, padded to a model's lengths: batches of training and evaluation.

B pairs, S rows of a source, T tokens of a target.
"""

import os
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from mpillm.errors import DataError
from mpillm.system import hdf5
from mpillm.system.json_text import from_json
from mpillm.system.messages import command, explain
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.manifest import Manifest, Split, check_shard
from mpillm.tokens.order import permute, task_keys
from mpillm.tokens.pairs.chat_rows import ChatBatches, ChatLengths, ChatSteps
from mpillm.tokens.pairs.pair_manifest import PairManifest
from mpillm.tokens.pairs.pair_shards import LEARNT, PairShard, ends_in_order, runs_of
from mpillm.tokens.pairs.sound import quiet_level
from mpillm.tokens.reader import TokenReader, check_open_shard
from mpillm.tokens.samples import EvaluationSamples, RawRows, RowShape, StepSamples

Array = np.ndarray[Any, np.dtype[Any]]
Int64s = np.ndarray[Any, np.dtype[np.int64]]
# The label of a token that does not count, such as [CLS] and the later parts of a word.
NO_LABEL = -1
# More tokens than any text has.
LARGEST = 1 << 62
# Shorter rows come in multiples of it: a GPU's allocator and oneDNN keep something of each length.
LENGTH_STEP = 8


class _OpenShard:
    """The open file of a shard, and its tables of ends."""

    def __init__(self, manifest: PairManifest, name: str, number: int) -> None:
        split = manifest.splits[name]
        shard: PairShard = split.shards[number]
        self.path, self.arrays = manifest.folder / shard.file, shard.arrays(manifest.pairs)
        check_shard(self.path, shard)
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as failure:
            raise DataError(f"cannot open the shard {explain(failure, self.path)}") from failure
        try:
            data = shard.data(manifest.pairs)
            check_open_shard(manifest.folder, name, split, number, self.descriptor, data)
            self.ends = self._ends(shard)
        except BaseException:
            os.close(self.descriptor)
            raise

    def _ends(self, shard: PairShard) -> dict[str, Int64s]:
        ends = {
            side: self.read(f"{side}_ends", 0, shard.n_docs).astype(np.int64)
            for side in ("source", "target")
        }
        totals = {"source": shard.n_source, "target": shard.n_target}
        if not all(ends_in_order(ends[side], total) for side, total in totals.items()):
            raise DataError(
                f"{self.path} is damaged: its tables of ends are not in order; "
                "copy the file again or prepare the dataset again"
            )
        return ends

    def read(self, name: str, first: int, last: int) -> Array:
        """Read the rows `first` to `last` - 1 of an array. Raises DataError."""
        dtype, shape, offset = self.arrays[name]
        out = np.empty((last - first, *shape[1:]), dtype)
        if out.size:
            begin = offset + first * (out.nbytes // len(out))
            try:
                hdf5.read_at(self.descriptor, out, begin)
            except (EOFError, OSError) as failure:
                raise DataError(f"{self.path} has shrunk: {failure}; copy it again") from failure
        return out

    def side(self, side: str, pair: int, most: int, closed: bool = False) -> Array:
        """Read up to `most` rows of one side of a pair; of a `closed` one also the last."""
        ends = self.ends[side]
        first, last = int(ends[pair - 1]) if pair else 0, int(ends[pair])
        if closed and last - first > most:
            kept = self.read(side, first, first + most - 1), self.read(side, last - 1, last)
            return np.concatenate(kept)
        return self.read(side, first, min(last, first + most))


class PairReader:
    """The pairs of one split, numbered from 0. Every rank opens its own."""

    def __init__(self, manifest: PairManifest, name: str) -> None:
        self.manifest, self.form, self.name = manifest, manifest.pairs, name
        self.split: Split[PairShard] = manifest.split(name)
        counts = [shard.n_docs for shard in self.split.shards]
        self._firsts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        self.n_pairs = int(self._firsts[-1])
        self._open: dict[int, _OpenShard] = {}
        self._packed: dict[tuple[RowShape, int, int], ChatSteps] = {}
        self._row_lengths: dict[int, ChatLengths] = {}
        self._lengths: dict[str, Int64s] = {}
        self.references: Array | None = None
        """Of preferences, the reference's log-probability of each pair's chosen answer and of its
        rejected one, float64 (n_pairs, 2). It is set before rows are read.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for shard in self._open.values():
            os.close(shard.descriptor)
        self._open = {}
        if "mismatched" in vars(self):
            self.mismatched.__exit__()

    @property
    def n_bytes(self) -> int:
        return self.split.n_bytes

    @property
    def _chats(self) -> bool:
        return self.form.sides.is_chat

    def steps(self, row: RowShape, batch: int, seed: int) -> StepSamples:
        """Order the pairs of a training run: each epoch a permutation of its own.

        With `row.documents` several conversations share a row.
        """
        if not self._chats:
            return PairSteps(self, row, batch, seed)
        # A run's plan and its trainer ask for the same rows, which take seconds to pack.
        key = row, batch, seed
        if key not in self._packed:
            self._packed[key] = ChatSteps(self, *key)
        return self._packed[key]

    def evaluation(self, row: RowShape, rows: int) -> EvaluationSamples:
        """Take all pairs in order, `rows` of them a batch."""
        kind = ChatBatches if self._chats else PairBatches
        return kind(self, row, rows)

    def describe(self, row: RowShape, samples: int) -> str:
        if self._chats:
            known = [steps for key, steps in self._packed.items() if key[0] == row]
            rows = len((known[-1] if known else ChatSteps(self, row, 1, 0)).packing)
            name = "pairs" if self.form.sides.sides > 1 else "conversations"
            what = f"{self.n_pairs:,} {name} in {rows:,} rows"
            return f"{what} of {row.tokens - 1:,}, read {samples / rows:.2f} times"
        return f"{self.n_pairs:,} pairs, read {samples / self.n_pairs:.2f} times"

    def lengths(self, side: str = "source") -> Int64s:
        """Count the tokens of each source or target, (n_pairs,). Raises DataError."""
        if side not in self._lengths:
            ends = [self._shard(number).ends[side] for number in range(len(self.split.shards))]
            self._lengths[side] = np.concatenate([np.diff(each, prepend=0) for each in ends])
        return self._lengths[side]

    def trimmed(self, numbers: Int64s, row: RowShape) -> RowShape:
        """Shorten `row` to the longest of the pairs `numbers`, where the model reads any length.

        Pairs of the same batch give the same row on each rank. Raises DataError.
        """
        if not row.lengths.trims or self.form.sides.source != "source":
            return row
        source = _fitting(self.lengths()[numbers], row.lengths.source_context)
        target = source
        if self.form.sides.target == "target":
            target = _fitting(self.lengths("target")[numbers], row.lengths.context)
        return replace(row, lengths=Lengths(target, source, True))

    def row_lengths(self, row: RowShape) -> ChatLengths:
        """Measure how much of each conversation a row takes, once. Raises DataError."""
        if row.tokens not in self._row_lengths:
            self._row_lengths[row.tokens] = ChatLengths(self, row.tokens)
        return self._row_lengths[row.tokens]

    def supervised(self, pair: int) -> Array:
        """Read which tokens of a conversation are learnt: 1, else 0. Raises DataError."""
        shard, place = self._place(pair)
        return shard.side("target", place, LARGEST)

    def conversation(self, pair: int, most: int = LARGEST) -> tuple[Array, Array]:
        """Read the first `most` ids of a conversation, and which of them are learnt."""
        shard, place = self._place(pair)
        ids, learnt = shard.side("source", place, most), shard.side("target", place, most)
        if len(learnt) != len(ids):
            raise self._damaged(pair)
        self._check(np.array([pair]), [ids], [learnt])
        return ids, learnt

    def sides(self, pair: int) -> tuple[Array, Array]:
        """Read both sides of a pair, whole. Raises DataError."""
        shard, place = self._place(pair)
        source, target = shard.side("source", place, LARGEST), shard.side("target", place, LARGEST)
        self._check(np.array([pair]), [source], [target])
        return source, target

    def reference_of(self, pair: int) -> Array:
        """Return the reference's log-probabilities of a pair's answers, (2,)."""
        assert self.references is not None, "the references of the rows are not set"
        return self.references[pair]  # type: ignore[no-any-return]

    @cached_property
    def mismatched(self) -> "MismatchedPairs":
        """The prompts of the pairs with the answers of others; closed with this reader."""
        return MismatchedPairs(self.manifest, self.name)

    def answer(self, pair: int) -> dict[str, Any]:
        """Read the target of a row of a question, see `questions.py`. Raises DataError."""
        shard, place = self._place(pair)
        found: dict[str, Any] = from_json(bytes(shard.side("target", place, LARGEST)))
        return found

    def _place(self, pair: int) -> tuple[_OpenShard, int]:
        number = int(np.searchsorted(self._firsts, pair, "right")) - 1
        return self._shard(number), pair - int(self._firsts[number])

    def describe_cuts(self, row: RowShape) -> str:
        """Say how many sources and targets are longer than a row, whose ends are cut off."""
        if self._chats:
            return self.row_lengths(row).describe()
        most = {"source": self._most_source(row), "target": row.lengths.context}
        found = []
        for side in ("source", "target") if self.form.sides.target == "target" else ("source",):
            count = int((self.lengths(side) > most[side]).sum())
            if count:
                found.append(f"{count:,} of {self.n_pairs:,} {side}s at {most[side]:,}")
        return f"cut off: {' and '.join(found)}; raise the model's lengths" if found else ""

    def read(self, numbers: Int64s, row: RowShape) -> RawRows:
        """Read the pairs `numbers`, (B,), padded to the lengths of `row`. Raises DataError.

        Tokens: `source` (B, S) and `source_lengths` (B,); sound: `frames` (B, F, mels), float32;
        pictures: `pixels` (B, C, height, width). Targets by kind: `target` (B, T) with
        `target_lengths`; `label` or `number` (B,); `classes` (B, K) of 1 and 0; `labels` (B, S),
        -1 where none counts; `span` (B, 2) with `kinds` and `in_context` (B, S).
        """
        shards = np.searchsorted(self._firsts, numbers, "right") - 1
        sources: dict[int, Array] = {}
        targets: dict[int, Array] = {}
        sides, most = self.form.sides, self._most_source(row)
        limits = {"labels": most, "classes": LARGEST, "answer": LARGEST}
        most_target = limits.get(sides.target, row.lengths.context)
        for shard, places in runs_of(shards):
            opened = self._shard(shard)
            for place in places.tolist():
                pair = int(numbers[place] - self._firsts[shard])
                sources[place] = opened.side("source", pair, most, self.form.closed)
                # Labels are cut as their tokens are.
                closed = self.form.closed and sides.target == "labels"
                targets[place] = opened.side("target", pair, most_target, closed)
        every = range(len(numbers))
        source, target = [sources[place] for place in every], [targets[place] for place in every]
        self._check(numbers, source, target)
        raw = self._source_rows(source, most)
        if sides.target == "label":
            return {**raw, "label": np.array([int(each[0]) for each in target], np.int64)}
        if sides.target == "number":
            return {**raw, "number": np.array([each[0] for each in target], np.float32)}
        if sides.target == "answer":
            return {**raw, **_answer_rows([from_json(bytes(each)) for each in target], most)}
        if sides.target == "classes":
            sets = np.zeros((len(target), len(self.form.classes)), np.float32)
            for row_K, each in zip(sets, target, strict=True):
                row_K[each] = 1
            return {**raw, "classes": sets}
        if sides.target == "labels":
            return {**raw, "labels": _padded(target, most, NO_LABEL)}
        return {
            **raw,
            "target": _padded(target, row.lengths.context, self.form.padding),
            "target_lengths": _lengths(target),
        }

    def _source_rows(self, source: list[Array], most: int) -> RawRows:
        kind = self.form.sides.source
        if kind == "pixels":
            return {kind: np.concatenate(source)}
        if kind == "source":
            return {
                kind: _padded(source, most, self.form.padding),
                "source_lengths": _lengths(source),
            }
        frames = np.empty((len(source), most, *self.form.item), np.float32)
        for row, each in zip(frames, source, strict=True):
            row[: len(each)] = each
            row[len(each) :] = quiet_level(row[: len(each)])
        return {kind: frames, "source_lengths": _lengths(source)}

    def _most_source(self, row: RowShape) -> int:
        lengths = row.lengths
        most = {"pixels": 1, "frames": lengths.frames, "source": lengths.source_context}
        return most[self.form.sides.source]

    def _shard(self, number: int) -> _OpenShard:
        if number not in self._open:
            self._open[number] = _OpenShard(self.manifest, self.name, number)
        return self._open[number]

    def _check(self, numbers: Int64s, source: list[Array], target: list[Array]) -> None:
        """Raise DataError unless each id is in the vocabulary, and each class is known."""
        sides, ids = self.form.sides, self.manifest.vocab_size
        tokens = {"source": (0, ids), "frames": None, "pixels": None}[sides.source]
        classes = {
            "target": (0, ids),
            "label": (0, len(self.form.classes)),
            "labels": (NO_LABEL, len(self.form.classes)),
            "classes": (0, len(self.form.classes)),
            "number": (-np.inf, np.inf),
            "answer": (0, 256),
            "supervised": (0, 2),
            "preferred": (0, 4),
        }[sides.target]
        for limits, rows in ((tokens, source), (classes, target)):
            for number, row in zip(numbers.tolist(), rows, strict=True):
                bad = sides.target in ("label", "number") and not len(row)
                if limits and row.size:
                    # NaN is in no range.
                    bad = bad or not (row.max() < limits[1] and row.min() >= limits[0])
                if bad:
                    raise self._damaged(number)

    def _damaged(self, pair: int) -> DataError:
        folder = self.manifest.folder
        return DataError(
            f"{folder} is damaged: pair {pair:,} of the {self.name} split has an id "
            f"or a class that it does not know; "
            f"`{command(['mpillm', 'prepare', '--verify', folder])}` finds all damage"
        )


class MismatchedPairs(PairReader):
    """Preferences of single answers, each prompt with the answer of the pair after it."""

    @cached_property
    def _firsts_learnt(self) -> Int64s:
        """The first learnt token of each answer, (n_pairs,)."""
        every = (self.supervised(pair) for pair in range(self.n_pairs))
        return np.array([int((marks & LEARNT).argmax()) for marks in every], np.int64)

    def lengths(self, side: str = "source") -> Int64s:
        answers = super().lengths(side) - self._firsts_learnt
        return self._firsts_learnt + np.roll(answers, -1)

    def conversation(self, pair: int, most: int = LARGEST) -> tuple[Array, Array]:
        after = (pair + 1) % self.n_pairs
        firsts = int(self._firsts_learnt[pair]), int(self._firsts_learnt[after])
        prompt = super().conversation(pair, firsts[0])
        answer = super().conversation(after)
        parts = zip(prompt, (each[firsts[1] :] for each in answer), strict=True)
        ids, marks = (np.concatenate(each)[:most] for each in parts)
        # Not one that is rejected: no label belongs to it.
        return ids, marks & LEARNT


def open_of(manifest: Manifest, split: str) -> TokenReader | PairReader:
    """Open a split of a dataset whose manifest was read before: no other one is opened.

    Raises DataError where a shard is missing or has another size.
    """
    manifest.check_shards(split)
    if isinstance(manifest, PairManifest):
        return PairReader(manifest, split)
    return TokenReader(manifest.folder, split, manifest.split(split), manifest.vocab_size)


class PairSteps:
    """The pairs of a training run, a pure function of (seed, step)."""

    def __init__(self, reader: PairReader, row: RowShape, batch: int, seed: int) -> None:
        self._reader, self._row, self._batch, self._seed = reader, row, batch, seed

    def raw(self, step: int, first: int, count: int) -> RawRows:
        """Read the rows of the batch of `step`, each with its key. Raises DataError."""
        assert 0 <= first < first + count <= self._batch
        ids = step * self._batch + np.arange(self._batch, dtype=np.int64)
        epochs = ids // self._reader.n_pairs
        numbers = permute(
            ids - epochs * self._reader.n_pairs, self._reader.n_pairs, self._seed, epochs
        )
        # All of the batch: the row's length is then the same on each rank, in each layout.
        row, own = self._reader.trimmed(numbers, self._row), slice(first, first + count)
        return {**self._reader.read(numbers[own], row), "keys": task_keys(self._seed, ids[own])}


class PairBatches:
    """All pairs of a split in order, in batches of `rows`."""

    def __init__(self, reader: PairReader, row: RowShape, rows: int) -> None:
        self._reader = reader
        self._bounds = [*range(0, reader.n_pairs, rows), reader.n_pairs]
        # A pipeline knows one length of a batch: a source and a target have two.
        trims = reader.form.sides.target != "target"
        self._rows = [
            reader.trimmed(self._numbers(number), row) if trims else row
            for number in range(len(self._bounds) - 1)
        ]
        self.shapes = [
            (len(self._numbers(number)), own.lengths.context)
            for number, own in enumerate(self._rows)
        ]
        """The rows of each batch, and the positions of each."""

    def raw(self, number: int) -> RawRows:
        """Read the arrays of batch `number`, with a key of each row. Raises DataError."""
        numbers = self._numbers(number)
        return {**self._reader.read(numbers, self._rows[number]), "keys": task_keys(0, numbers)}

    def _numbers(self, number: int) -> Int64s:
        return np.arange(*self._bounds[number : number + 2], dtype=np.int64)


def _fitting(lengths: Int64s, most: int) -> int:
    """Return a length for all of `lengths`, `most` at most: few different ones."""
    longest = max(1, int(lengths.max()))
    return min(most, -(-longest // LENGTH_STEP) * LENGTH_STEP)


def _padded(rows: list[Array], most: int, padding: int) -> Array:
    out = np.full((len(rows), most), padding, np.int64)
    for whole, row in zip(out, rows, strict=True):
        whole[: len(row)] = row
    return out


def _answer_rows(targets: list[dict[str, Any]], most: int) -> RawRows:
    """Return the spans of answers, the kinds of tokens, and which are of the context."""
    inside = np.zeros((len(targets), most), bool)
    for row, each in zip(inside, targets, strict=True):
        row[each["first"] : each["first"] + len(each["offsets"]) // 2] = True
    kinds = [np.array(each["kinds"], np.int64) for each in targets]
    span = np.array([each["span"] for each in targets], np.int64)
    return {"span": span, "kinds": _padded(kinds, most, 0), "in_context": inside}


def _lengths(rows: list[Array]) -> Int64s:
    return np.array([len(row) for row in rows], np.int64)
