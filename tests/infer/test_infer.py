"""A small trained model, scored and made to speak, at any number of ranks."""

import itertools
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpillm.errors import CheckpointError, DataError, MismatchError, UsageError
from mpillm.infer.baselines import score_baselines
from mpillm.infer.evaluate import WholeModel, evaluate
from mpillm.infer.generate import generate, sample_tokens
from mpillm.infer.loading import TOKENIZER, Loaded, load_trained, model_tensors
from mpillm.infer.print_evaluation import print_evaluation
from mpillm.infer.print_generation import print_generation
from mpillm.infer.sampling import Sampling, check_prompt
from mpillm.infer.scores.score import Score
from mpillm.models.decoder import DecoderConfig
from mpillm.models.encoder_decoder import SHAPES
from mpillm.models.part_module import PartModule, create
from mpillm.system.console import Console
from mpillm.tasks.metrics.metric_catalog import make_metrics
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.reader import open_split
from mpillm.tokens.tokenizer import byte_tokenizer
from mpillm.train.recipe import parse_recipe
from mpillm.train.setup import train
from mpillm.verbs.generate import Generate
from mpillm.weights.saving import save

METRICS = make_metrics(["loss", "perplexity", "bits-per-byte"])
QUIET = Console(speaks=False)


@pytest.fixture(scope="session")
def trained(shared_folder: Path, documents: Path, comm: MPI.Intracomm) -> Path:
    """Train a few steps on bytes. Tests read it; none writes into it."""
    folder = shared_folder / "infer"
    out = folder / "data"
    prepare(PrepareOptions((str(documents),), out, tokenizer="bytes", validation=0.1), comm, QUIET)
    table = {
        "model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 48},
        "data": {"path": str(out)},
        "optimizer": {"learning_rate": 5e-3, "warmup_steps": 5},
        "train": {"run": str(folder / "run"), "sinks": [], "steps": 30, "batch": 12},
    }
    train(parse_recipe(table, "test"), comm, QUIET)
    return folder / "run"


def loaded_and_score(trained: Path, comm: MPI.Intracomm) -> tuple[Loaded, Score]:
    loaded = load_trained(trained, comm, QUIET)
    with open_split(trained.parent / "data", "validation") as reader:
        return loaded, evaluate(WholeModel(loaded.model, loaded.task, comm), reader, comm, QUIET)


def test_the_score_is_the_same_at_any_number_of_ranks(trained: Path, comm: MPI.Intracomm) -> None:
    _, score = loaded_and_score(trained, comm)
    _, alone = loaded_and_score(trained, MPI.COMM_SELF)
    assert score == alone
    assert comm.allgather(score) == [score] * comm.size


def test_the_score_is_the_mean_over_every_target(trained: Path, comm: MPI.Intracomm) -> None:
    """Against the plain way: one window after the other, one loss a token."""
    loaded, score = loaded_and_score(trained, comm)
    with open_split(trained.parent / "data", "validation") as reader:
        tokens = np.empty(reader.n_tokens, reader.dtype)
        reader.read(0, tokens)
        text_bytes = reader.split.n_bytes
    ids = torch.from_numpy(tokens.astype(np.int64))
    losses = []
    with torch.inference_mode():
        for first in range(0, len(ids) - 1, 48):
            window = ids[first : first + 49]
            logits = loaded.model(window[None, :-1])[0].double().log_softmax(-1)
            losses += (-logits[torch.arange(len(window) - 1), window[1:]]).tolist()
    assert score.totals.weight == len(losses) == len(ids) - 1
    assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.values["bits-per-byte"] == pytest.approx(
        sum(losses) / math.log(2) / text_bytes, rel=1e-5
    )


def test_baselines_are_probabilities_and_in_order(trained: Path, comm: MPI.Intracomm) -> None:
    data = trained.parent / "data"
    with open_split(data) as reader, open_split(data, "validation") as held_out:
        counted = score_baselines(reader, held_out, 257, METRICS)
        tokens = np.empty(reader.n_tokens, reader.dtype)
        reader.read(0, tokens)
        targets = np.empty(held_out.n_tokens, held_out.dtype)
        held_out.read(0, targets)
    assert counted.bigram.loss < counted.unigram.loss < math.log(257)
    ids = tokens.tolist()
    counts, pairs = Counter(ids), Counter(itertools.pairwise(ids))
    kinds = Counter(before for before, _ in pairs)

    def unigram(token: int) -> float:
        return (counts[token] + 1) / (len(ids) + 257)

    def bigram(before: int, token: int) -> float:
        if not counts[before]:
            return unigram(token)
        return (pairs[before, token] + kinds[before] * unigram(token)) / (
            counts[before] + kinds[before]
        )

    both = list(zip(targets[:-1].tolist(), targets[1:].tolist(), strict=True))
    assert counted.unigram.loss == pytest.approx(-np.mean([math.log(unigram(b)) for _, b in both]))
    assert counted.bigram.loss == pytest.approx(-np.mean([math.log(bigram(a, b)) for a, b in both]))
    assert sum(bigram(ids[0], token) for token in range(257)) == pytest.approx(1, abs=0.01)


def test_the_same_seed_gives_the_same_text(trained: Path, comm: MPI.Intracomm) -> None:
    loaded = load_trained(trained, comm, QUIET)
    texts = [
        "".join(
            generate(
                loaded.model, loaded.tokenizer, "def test_", Sampling(max_tokens=120, seed=seed)
            )
        )
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert comm.allgather(texts) == [texts] * comm.size


def test_the_cache_and_the_slide_change_no_likeliest_token() -> None:
    """Greedy, with the cache, against the plain way: the whole context again for each token."""
    model = create(
        DecoderConfig(layers=2, width=32, heads=4, context=24, vocab_size=60), seed=5
    ).eval()
    prompt, expected = [1, 2, 3], [1, 2, 3]
    for _ in range(21):
        with torch.inference_mode():
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    found = list(sample_tokens(model, prompt, Sampling(max_tokens=21, temperature=0.0)))
    assert prompt + found == expected
    assert len(list(sample_tokens(model, prompt, Sampling(max_tokens=100)))) == 100
    assert len(list(sample_tokens(model, list(range(50)), Sampling(max_tokens=5)))) == 5


def translator(name: str = "t5-tiny") -> PartModule:
    """Make a small model that reads a source, with weights that choose between tokens."""
    spec = SHAPES[name].replace(
        layers=2, width=32, heads=4, hidden=48, context=12, source_context=16, vocab_size=257
    )
    model = create(spec.replace(start_token=-1, tied=False), 3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model.eval()


def test_a_source_is_read_once_and_the_text_ends_with_the_context() -> None:
    model, tokenizer = translator(), byte_tokenizer()
    with torch.inference_mode():
        source = {"source": torch.tensor([tokenizer.encode("a source")])}
        ids = [tokenizer.eot_id]
        for _ in range(12):
            logits = model({**source, "ids": torch.tensor([ids])})  # the whole text, each time
            ids.append(int(logits[0, -1].argmax()))
    sampling = Sampling(max_tokens=50, temperature=0)
    assert list(sample_tokens(model, ids[:1], sampling, source)) == ids[1:]
    wanted = ids[1:].index(tokenizer.eot_id) if tokenizer.eot_id in ids[1:] else 12
    text = "".join(generate(model, tokenizer, "a source", sampling))
    assert text == tokenizer.decode(ids[1 : 1 + wanted])
    assert "".join(generate(model, tokenizer, "another", sampling)) != text


def test_a_prompt_that_no_source_can_be_is_refused() -> None:
    tokenizer, sampling = byte_tokenizer(), Sampling(max_tokens=2)
    with pytest.raises(UsageError, match=r"a source of 17 tokens, and the model reads 16"):
        list(generate(translator(), tokenizer, "x" * 17, sampling))
    with pytest.raises(UsageError, match="the model reads frames of sound"):
        list(generate(translator("whisper-tiny"), tokenizer, "x", sampling))


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"max_tokens": 0}, "a number from 1 to 1,000,000,000"),
        ({"max_tokens": 10**30}, "a number from 1 to 1,000,000,000"),
        ({"temperature": -1.0}, "a number from 0 to 1,000,000"),
        ({"temperature": math.nan}, "a number from 0 to 1,000,000"),
        ({"temperature": math.inf}, "a number from 0 to 1,000,000"),
        ({"top_k": -1}, "a number from 0, and not -1"),
        ({"top_p": 0.0}, "a number above 0 and at most 1"),
        ({"top_p": 1.5}, "a number above 0 and at most 1"),
        ({"top_p": math.nan}, "a number above 0 and at most 1"),
        ({"seed": -1}, "a number from 0 to 2"),
        ({"seed": 1 << 63}, "a number from 0 to 2"),
    ],
)
def test_sampling_out_of_range(wrong: dict[str, float], rule: str) -> None:
    option = next(iter(wrong)).replace("_", "-")
    with pytest.raises(UsageError, match=f"--{option} is {rule}"):
        Sampling(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"--{option} is {rule}"):
        Generate(Path("run"), "", **wrong)  # type: ignore[arg-type]


def test_a_prompt_of_bytes_that_are_no_text_is_refused() -> None:
    check_prompt("é\0 and 🙂")
    with pytest.raises(UsageError, match=r"--prompt holds bytes .*\(the first is byte 2\)"):
        Generate(Path("run"), os.fsdecode("é".encode() + b"\xe9"))


def spoiled(trained: Path, folder: Path, comm: MPI.Intracomm) -> Path:
    """Save the trained model again, with one weight that is NaN."""
    loaded = load_trained(trained, comm, QUIET)
    tensors = model_tensors(loaded.model)
    next(iter(tensors.values())).data.view(-1)[3] = math.nan
    facts, text = loaded.checkpoint.facts, loaded.checkpoint.text(TOKENIZER)
    folder.mkdir(exist_ok=True)
    return save(folder / "checkpoints", tensors, facts, {TOKENIZER: text}, comm)


def test_weights_that_are_no_numbers(
    trained: Path, folder: Path, comm: MPI.Intracomm, capsys: pytest.CaptureFixture[str]
) -> None:
    path, console = spoiled(trained, folder, comm), Console(speaks=comm.rank == 0)
    with pytest.raises(CheckpointError, match=f"in {path} holds NaN or an infinity: the run had"):
        print_generation(path, "the prompt", Sampling(), comm, console)
    assert "the prompt" not in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=f"in {path} holds NaN or an infinity: the run had"):
        print_evaluation(path, trained.parent / "data", False, True, comm, console)
    assert not capsys.readouterr().out


def test_data_that_is_not_found_from_here(
    trained: Path, folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run names its data by a path from the folder in which it trained."""
    loaded = load_trained(trained, comm, QUIET)
    recipe = dict(loaded.checkpoint.facts["recipe"])
    recipe |= {"data": {"path": "data"}, "train": recipe["train"] | {"run": "infer/run"}}
    facts = loaded.checkpoint.facts | {"recipe": recipe}
    text = loaded.checkpoint.text(TOKENIZER)
    run, tensors = folder / "there/infer/run", model_tensors(loaded.model)
    run.mkdir(parents=True, exist_ok=True)
    save(run / "checkpoints", tensors, facts, {TOKENIZER: text}, comm)
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match="the run's dataset data is not here: its path begins in"):
        print_evaluation(run, None, False, False, comm, QUIET)
    comm.Barrier()
    if comm.rank == 0:
        shutil.copytree(trained.parent / "data", folder / "there/data")
    comm.Barrier()
    with pytest.raises(DataError, match=r"its path begins in .*/there; go there"):
        print_evaluation(run, None, False, False, comm, QUIET)
    monkeypatch.chdir(folder / "there")
    print_evaluation(run, None, False, False, comm, QUIET)


def test_a_checkpoint_of_mpillm_0_1_scores_as_it_did(comm: MPI.Intracomm) -> None:
    """The run printed this validation loss when it saved the checkpoint."""
    tests = Path(__file__).parents[1]
    loaded = load_trained(tests / "weights/data_0_1/step-00000004", comm, QUIET)
    with open_split(tests / "tokens/data_0_1", "validation") as reader:
        score = evaluate(WholeModel(loaded.model, loaded.task, comm), reader, comm, QUIET)
    assert score.loss == pytest.approx(5.24903361716967, rel=1e-6)


def test_data_of_another_tokenizer_is_refused(
    trained: Path, documents: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    prepare(
        PrepareOptions((str(documents),), folder / "bpe", vocab_size=300, validation=0.1),
        comm,
        QUIET,
    )
    with pytest.raises(MismatchError, match="was made with the tokenizer bpe"):
        print_evaluation(trained, folder / "bpe", False, False, comm, QUIET)
