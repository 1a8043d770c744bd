"""Likelihoods and texts over ranks: the bits of one rank, and those of the plain model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import DataError, MismatchError, UsageError
from mpillm.infer.decoding.token_rows import TokenRows
from mpillm.infer.harness.harness_model import (
    HarnessModel,
    batches_of,
    check_continues,
    open_model_for_harness,
    share_of,
    windows_of,
)
from mpillm.infer.harness.task_file import TextSettings
from mpillm.infer.loading import load_trained
from mpillm.models.linear_head import plain_outputs
from mpillm.models.model_catalog import named_shapes
from mpillm.models.part_module import create
from mpillm.system.console import Console
from tests.infer.harness.random_model import SPEC, make_model

QUIET = Console(speaks=False)
PAIRS = [
    (f"{'word ' * (number % 9)}of {number}", f" is{' more' * (number % 4)} {number % 3}")
    for number in range(50)
]
# A question of several choices, no context, spaces at its end, and more than the model reads.
PAIRS += [("A or B?", " A"), ("A or B?", " B"), ("", "alone"), ("ends ", "here"), ("x" * 300, "y")]


@pytest.fixture(scope="module")
def path(shared_folder: Path, comm: MPI.Intracomm) -> Path:
    folder = shared_folder / "harness_model"
    if comm.rank == 0:
        folder.mkdir()
        make_model(folder)
    comm.Barrier()
    return folder / "model"


@pytest.fixture(scope="module")
def models(path: Path, comm: MPI.Intracomm) -> tuple[HarnessModel, HarnessModel]:
    """The model on all ranks together, and on each alone."""
    return (
        open_model_for_harness(path, comm, QUIET, "cpu"),
        open_model_for_harness(path, MPI.COMM_SELF, QUIET, "cpu"),
    )


def test_results_have_the_bits_of_one_rank(models: tuple[HarnessModel, HarnessModel]) -> None:
    together, alone = models
    assert together.likelihoods(PAIRS) == alone.likelihoods(PAIRS)
    assert together.cut == alone.cut > 0
    texts = [context for context, _ in PAIRS]
    assert together.rolling(texts) == alone.rolling(texts)
    for settings in (TextSettings(("o", "zz"), 9), TextSettings((), 5, 1.0)):
        found = together.texts(texts, settings)
        assert found == alone.texts(texts, settings)
        assert len(found) == len(PAIRS)
    assert together.likelihoods([]) == []


def test_they_are_those_of_the_plain_model(models: tuple[HarnessModel, HarnessModel]) -> None:
    model, eot = models[0], 256
    found = model.likelihoods(PAIRS)
    for (context, continuation), ours in zip(PAIRS, found, strict=True):
        kept = context.rstrip()
        ahead, ids = list(kept.encode()) or [eot], list((context + continuation).encode())
        ids = ids[len(kept.encode()) :]
        read = torch.tensor([(ahead + ids)[-SPEC.context - 1 :]])
        with torch.inference_mode():
            made = model.loaded.model.forward_part({"ids": read[:, :-1]}, ()).outputs
            [logits_TV] = plain_outputs(made)[0].log_softmax(-1)[:, -len(ids) :]
        wanted = logits_TV.gather(1, torch.tensor(ids)[:, None]).sum().item()
        assert ours.value == pytest.approx(wanted, abs=1e-4)
        assert ours.greedy == (logits_TV.argmax(-1).tolist() == ids)


def test_texts_end_ahead_of_a_stop(models: tuple[HarnessModel, HarnessModel]) -> None:
    """By greedy tokens of each text alone."""
    model = models[0]
    contexts = [context for context, _ in PAIRS if context][:12]
    tokenizer = model.loaded.tokenizer
    whole = []
    for context in contexts:
        rows, ids = TokenRows(model.loaded.model, [tokenizer.encode(context)[-108:]]), []
        for _ in range(20):
            token = rows.logits().argmax(-1)
            if int(token) == tokenizer.eot_id:
                break
            ids.append(int(token))
            rows.push(token)
        whole.append(tokenizer.decode(ids))
    assert model.texts(contexts, TextSettings((), 20)) == whole
    # A letter from the middle of the first text.
    stop = whole[0][len(whole[0]) // 2]
    assert model.texts(contexts, TextSettings((stop,), 20)) == [t.split(stop)[0] for t in whole]


def test_windows_score_each_token_once() -> None:
    ids = list(range(10))
    # The example of lm-eval's own documentation.
    assert list(windows_of(ids, 99, 4)) == [
        ([99], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    for length in (1, 3, 4, 10, 11):
        windows = list(windows_of(ids, 99, length))
        assert [token for _, own in windows for token in own] == ids
        assert all(len(ahead) + len(own) - 1 <= length for ahead, own in windows)
    assert list(windows_of([], 99, 4)) == []


def test_batches_hold_each_row_once() -> None:
    lengths = [number * 37 % 501 for number in range(200)]
    batches = list(batches_of(lengths))
    assert sorted(number for batch in batches for number in batch) == list(range(200))
    assert len(batches) >= 16
    assert all(len(batch) * lengths[batch[0]] <= 4096 for batch in batches)
    for ranks in range(1, 6):
        shares = [share_of(batches, rank, ranks) for rank in range(ranks)]
        assert sorted(batch for share in shares for batch in share) == sorted(batches)
        work = [sum(len(batch) * lengths[batch[0]] for batch in share) for share in shares]
        assert max(work) < 1.3 * sum(work) / ranks


def test_what_cannot_be_scored_is_refused(models: tuple[HarnessModel, HarnessModel]) -> None:
    model = models[0]
    with pytest.raises(DataError, match="the continuation '' has no token of its own"):
        model.likelihoods([*PAIRS, ("a", "")])
    with pytest.raises(DataError, match="has 129 tokens, and the model's context 128; shorten it"):
        model.likelihoods([("a", "b" * 129), *PAIRS])
    with pytest.raises(UsageError, match="max_gen_toks is 128, and must be less than the model's"):
        model.texts(["a"], TextSettings((), 128))


@pytest.mark.parametrize("shape", ["bert-tiny", "t5-tiny"])
def test_a_model_that_is_no_decoder_is_refused(shape: str, comm: MPI.Intracomm, path: Path) -> None:
    loaded = load_trained(path, comm, QUIET)
    check_continues(loaded)
    spec = named_shapes()[shape].replace(vocab_size=300)
    with pytest.raises(MismatchError, match="asks a decoder for the probability of next tokens"):
        check_continues(replace(loaded, model=create(spec, 0)))
