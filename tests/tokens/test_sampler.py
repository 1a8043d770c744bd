"""Batches: tokens and document ends of each window, against a plain reference, at any ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.errors import DataError
from mpillm.tokens.manifest import NO_TOKENIZER, Manifest, Split
from mpillm.tokens.reader import open_split
from mpillm.tokens.sampler import KEPT_PLANS, Sampler
from mpillm.tokens.shards import Documents, write_shard
from mpillm.tokens.windows import ReadPlan, evaluation_batches, read_evaluation

CONTEXT = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Write 5 shards, small ones too; return a reader, and tokens and document ends in memory."""
    folder = tmp_path_factory.mktemp("dataset")
    generator = np.random.default_rng(0)
    shards, everything, ends = [], [], []
    for number, n_docs in enumerate([40, 1, 3, 200, 1]):
        lengths = generator.integers(1, 30, n_docs)
        tokens = generator.integers(0, 60_000, lengths.sum()).astype("<u2")
        ends.append(np.cumsum(lengths) + sum(map(len, everything)))
        everything.append(tokens)
        content = Documents(tokens, np.cumsum(lengths), np.zeros(n_docs), np.zeros(n_docs))
        shards.append(write_shard(folder / f"train-{number:05d}.h5", content, {}))
    split = Split(sum(map(len, everything)), sum(s.n_docs for s in shards), 0, tuple(shards))
    Manifest(folder, NO_TOKENIZER, {}, {"train": split, "validation": Split(0, 0, 0, ())}).save()
    return open_split(folder), np.concatenate(everything), np.concatenate(ends)


def reference_ends(ends, start, length):
    return [int(end - start) for end in ends if start < end < start + length]


@pytest.mark.parametrize("length", [1, 2, 17, 150, 900])
def test_windows_and_their_document_ends(dataset, length):
    """At 900 tokens a window spans up to four shards."""
    reader, tokens, ends = dataset
    starts = np.random.default_rng(1).permutation(len(tokens) - length + 1)
    plan = ReadPlan(reader, starts, length)
    out = np.empty((len(starts), length), reader.dtype)
    windows = plan.fetch(0, out)
    for row, start in enumerate(starts.tolist()):
        assert np.array_equal(windows.tokens_BT[row], tokens[start : start + length])
        assert windows.ends_of(row).tolist() == reference_ends(ends, start, length)
    assert windows.ends.dtype == np.int32


@pytest.mark.parametrize("readahead", [None, True, False])
def test_a_batch_is_the_same_however_it_is_shared(dataset, readahead):
    reader, tokens, ends = dataset
    whole = Sampler(reader, CONTEXT, 12, 3)
    for step in (0, 1, 7, 400, 10**7):
        batch = whole.windows(step, 0, 12)
        assert batch.starts.tolist() == whole.order.starts(step * 12 + np.arange(12)).tolist()
        for ranks in (2, 3, 4, 12):
            sampler = Sampler(reader, CONTEXT, 12, 3, readahead)
            shares = [
                sampler.windows(step, rank * 12 // ranks, 12 // ranks) for rank in range(ranks)
            ]
            assert np.array_equal(np.concatenate([s.tokens_BT for s in shares]), batch.tokens_BT)
            assert np.array_equal(np.concatenate([s.ends for s in shares]), batch.ends)
        for row, start in enumerate(batch.starts.tolist()):
            assert np.array_equal(batch.tokens_BT[row], tokens[start : start + CONTEXT + 1])
            assert batch.ends_of(row).tolist() == reference_ends(ends, start, CONTEXT + 1)


def test_all_ranks_together_hold_the_batch(dataset, comm):
    reader, _, _ = dataset
    sampler = Sampler(reader, CONTEXT, 4 * comm.size, 5)
    for step in range(5):
        mine = sampler.windows(step, 4 * comm.rank, 4)
        gathered = np.concatenate(comm.allgather(mine.starts))
        assert (
            gathered.tolist()
            == sampler.order.starts(step * 4 * comm.size + np.arange(4 * comm.size)).tolist()
        )


def test_a_reused_buffer(dataset):
    reader, _, _ = dataset
    sampler, other = (
        Sampler(reader, CONTEXT, 8, 0),
        Sampler(reader, CONTEXT, 8, 0, boundaries=False),
    )
    buffer = np.empty((8, CONTEXT + 1), reader.dtype)
    for step in range(3):
        fresh, reused = sampler.windows(step, 0, 8), other.windows(step, 0, 8, buffer)
        assert reused.tokens_BT is buffer
        assert np.array_equal(fresh.tokens_BT, buffer)
        assert reused.ends_of(3).tolist() == []


def test_plans_are_not_kept_without_end(dataset):
    reader, _, _ = dataset
    sampler = Sampler(reader, CONTEXT, 100, 0)
    for first in range(100):
        sampler.windows(0, first, 1)
    assert sampler._plan_of_block.cache_info().currsize <= KEPT_PLANS < 100


def test_a_dataset_shorter_than_a_window(dataset):
    reader, tokens, _ = dataset
    with pytest.raises(DataError, match=f"the dataset has {len(tokens)}"):
        Sampler(reader, len(tokens), 1, 0)


@given(
    n_tokens=st.integers(2, 3000),
    context=st.integers(1, 400),
    rows=st.integers(1, 9),
    ranks=st.integers(1, 4),
)
def test_evaluation_predicts_each_token_once(n_tokens, context, rows, ranks):
    batches = evaluation_batches(n_tokens, context, rows)
    shared = [batch for rank in range(ranks) for batch in batches[rank::ranks]]
    targets = [
        b.start + r * b.length + i + 1
        for b in shared
        for r in range(b.rows)
        for i in range(b.length)
    ]
    assert sorted(targets) == list(range(1, n_tokens))
    assert all(b.rows <= rows and b.length <= context for b in batches)


def test_evaluation_reads_the_tokens_in_order(dataset):
    reader, tokens, ends = dataset
    targets = []
    for batch in evaluation_batches(len(tokens), 50, 8):
        windows = read_evaluation(reader, batch)
        targets += windows.tokens_BT[:, 1:].reshape(-1).tolist()
        assert windows.ends_of(0).tolist() == reference_ends(ends, batch.start, batch.length + 1)
    assert targets == tokens[1:].tolist()


def test_the_fields_of_a_batch_number_its_documents(dataset):
    reader, _, ends = dataset
    windows = Sampler(reader, 100, 6, 0).windows(3, 0, 6)
    assert list(windows.fields(documents=False)) == ["tokens"]
    fields = windows.fields(documents=True)
    assert fields["tokens"] is windows.tokens_BT
    assert fields["documents"].dtype == np.int64
    for row, start in enumerate(windows.starts.tolist()):
        inside = [sum(start < end <= start + i for end in ends) for i in range(101)]
        assert fields["documents"][row].tolist() == inside


def test_evaluation_of_one_token():
    with pytest.raises(DataError, match="at least 2 tokens"):
        evaluation_batches(1, 8, 4)
