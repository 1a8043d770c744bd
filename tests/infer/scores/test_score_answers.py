"""Questions on a context: their rows, their loss, and the texts of their answers."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from mpi4py import MPI
from tokenizers import models, pre_tokenizers, processors

from mpillm.errors import DataError, MismatchError, UsageError
from mpillm.infer.evaluate import WholeModel
from mpillm.infer.loading import load_trained, open_of
from mpillm.infer.print_evaluation import print_evaluation
from mpillm.infer.scores.score_answers import score_answers
from mpillm.infer.task_checks import check_task
from mpillm.models.model_catalog import read_spec
from mpillm.runs.metrics import read_metrics
from mpillm.system.console import Console
from mpillm.tasks.question_answering import best_spans
from mpillm.tasks.task_catalog import make_task
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.pairs.pair_manifest import PairManifest
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.samples import RowShape
from mpillm.train.recipe import parse_recipe
from mpillm.train.setup import train
from mpillm.weights.places import best_checkpoint
from tests.models.families.oracle import adopt, check_gradients, perturb, stored
from tests.tasks.test_text_tasks import SMALL

QUIET = Console(speaks=False)
NAMES = ["ann", "bob", "eve", "dan", "kim", "lee"]
PLACES = ["rome", "oslo", "lima", "cairo", "delhi", "paris"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "where", "is", "in", ".", *NAMES, *PLACES]


def tokenizer(path: Path) -> Path:
    inner = tokenizers.Tokenizer(
        models.WordPiece({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(WORDS[:4])
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    inner.save(str(path))
    return path


def squad(count: int, unanswered: bool = False) -> dict[str, Any]:
    """Contexts of four sentences, one of which has a place: the answer to its question."""
    chance, paragraphs = np.random.default_rng(7), []
    for number in range(count):
        who, where = chance.permutation(NAMES)[:4], str(chance.choice(PLACES))
        asked = -1 if unanswered and number % 5 == 0 else int(chance.integers(4))
        said = [f"{name} is in {where if n == asked else 'is'} ." for n, name in enumerate(who)]
        context = " ".join(said)
        answers = [{"text": where, "answer_start": context.index(where)}] if asked >= 0 else []
        question = {"id": str(number), "question": f"where is {who[asked]}", "answers": answers}
        paragraphs.append({"context": context, "qas": [question]})
    return {"version": "2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}


def prepared(folder: Path, comm: MPI.Intracomm, value: Any, **more: Any) -> PairManifest:
    path = folder / "squad.json"
    if comm.rank == 0:
        path.write_text(json.dumps(value))
        tokenizer(folder / "words.json")
    comm.Barrier()
    given = {"validation": 0.3, "row_tokens": 14, "stride": 4, **more}
    options = PrepareOptions(
        (str(path),),
        folder / "data",
        tokenizer=str(folder / "words.json"),
        end_of_text="[SEP]",
        task="question-answering",
        **given,
    )
    made = prepare(options, comm, QUIET)
    assert isinstance(made, PairManifest)
    return made


def test_a_long_context_becomes_rows_that_overlap(tmp_path: Path) -> None:
    manifest = prepared(tmp_path, MPI.COMM_SELF, squad(20), validation=0.0)
    with PairReader(manifest, "train") as reader:
        targets = [reader.answer(number) for number in range(reader.n_pairs)]
        row = RowShape(0, Lengths(14, 14))
        raw = reader.read(np.arange(reader.n_pairs), row)
    # 20 tokens of context in rows with 8 of them, of which 4 overlap: 4 rows each.
    assert len(targets) == 80
    assert len({each["question"] for each in targets}) == 20
    learnt = 0
    for number, each in enumerate(targets):
        first, last = each["span"]
        begin = each["first"]
        count = len(each["offsets"]) // 2
        # [CLS], the three words of the question, [SEP].
        assert raw["in_context"][number].nonzero()[0].tolist() == list(range(5, 5 + count))
        assert raw["kinds"][number].sum() == count + 1
        if first:
            learnt += 1
            offsets = each["offsets"]
            text = each["context"][offsets[2 * (first - begin)] : offsets[2 * (last - begin) + 1]]
            assert text == each["answers"][0]
    assert learnt >= 20


def test_the_loss_and_its_gradients_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(6)
    config = transformers.BertConfig(**SMALL)
    theirs = perturb(transformers.BertForQuestionAnswering(config)).eval()
    ours = adopt({**config.to_dict(), "architectures": [type(theirs).__name__]}, stored(theirs))
    ids = np.array([[3, 4, 5, 6, 9], [7, 8, 2, 1, 4]])
    kinds, span = np.array([[0, 0, 1, 1, 1]] * 2), np.array([[2, 3], [0, 0]])
    raw = {"source": ids, "source_lengths": np.array([5, 5]), "kinds": kinds, "span": span}
    task = make_task("question-answering")
    fields = task.fields({**raw, "in_context": kinds > 0})
    outputs = ours[2].forward_part(fields, ()).outputs
    loss = task.loss_sum(outputs, fields) / task.weight(fields)
    loss.backward()
    loss = loss.detach()
    starts, ends = torch.from_numpy(span.T)
    wanted = theirs(
        torch.from_numpy(ids),
        token_type_ids=torch.from_numpy(kinds),
        start_positions=starts,
        end_positions=ends,
    ).loss
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    check_gradients(ours, stored(theirs, gradients=True))
    # Padding has no part in it.
    padded = torch.nn.functional.pad(outputs[0].detach(), (0, 3), value=99.0)
    again = task.loss_sum((padded,), fields) / task.weight(fields)
    assert float(again) == pytest.approx(float(loss), rel=1e-6)
    assert task.weight(fields) == task.fixed_weight(2, 5)


def test_the_best_span_is_that_of_a_plain_search() -> None:
    chance = np.random.default_rng(8)
    logits = chance.normal(size=(40, 2, 45))
    inside = chance.random((40, 45)) < 0.8
    inside[0] = False
    found = best_spans([logits], {"in_context": inside})
    for row in range(40):
        best = (-np.inf, 0, 0)
        for i in range(45):
            for j in range(i, min(i + 30, 45)):
                if inside[row, i] and inside[row, j]:
                    best = max(best, (logits[row, 0, i] + logits[row, 1, j], i, j))
        assert found[row, :3].tolist() == pytest.approx(list(best))
        assert found[row, 3] == logits[row, :, 0].sum()


def test_answers_are_learnt_and_scored_alike_on_any_ranks(
    folder: Path, comm: MPI.Intracomm
) -> None:
    manifest = prepared(folder, comm, squad(120, unanswered=True))
    table: dict[str, Any] = {
        "model": {"architecture": "encoder", "layers": 2, "width": 32, "heads": 4, "context": 14}
        | {"hidden": 64, "head": "span", "head_layer": "none", "token_types": 2},
        "task": {"name": "question-answering"},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 5},
        "data": {"path": str(manifest.folder)},
        "train": {"run": str(folder / "run"), "sinks": [], "steps": 40, "batch": 24}
        | {"evaluate_every": 20, "keep_best": "validation_squad_f1"},
    }
    train(parse_recipe(table, "r"), comm, QUIET)
    comm.Barrier()
    loaded = load_trained(folder / "run", comm, QUIET)
    scores = []
    for each in (comm, MPI.COMM_SELF):
        with open_of(Manifest.load(manifest.folder), "validation") as reader:
            assert isinstance(reader, PairReader)
            scorer = WholeModel(loaded.model, loaded.task, each)
            scores.append(score_answers(scorer, reader, each, QUIET))
            with pytest.raises(UsageError, match="accuracy compares no answers; take loss, exact"):
                score_answers(scorer, reader, each, QUIET, ["accuracy"])
    assert scores[0] == scores[1]
    # Training's own evaluations have them, without intervals, and keep the best checkpoint by them.
    lines = [
        line for line in read_metrics(folder / "run/metrics.jsonl") if "validation_loss" in line
    ]
    assert [line["step"] for line in lines] == [20, 40]
    for name in ("exact-match", "squad-f1"):
        own = lines[-1][f"validation_{name.replace('-', '_')}"]
        assert own == pytest.approx(scores[0].values[name])
    best = max(lines, key=lambda line: line["validation_squad_f1"])["step"]
    assert (
        best_checkpoint(folder / "run/checkpoints") == folder / f"run/checkpoints/step-{best:08d}"
    )
    run, said = folder / "run", io.StringIO()
    speaks = Console(stream=said, speaks=comm.rank == 0)
    print_evaluation(run, None, False, True, comm, speaks, other=run)
    if comm.rank == 0:
        printed = json.loads(said.getvalue())
        assert printed["model"]["exact_match"] == scores[0].values["exact-match"]
        assert printed["difference"]["squad_f1"]["value"] == 0
    assert scores[0].rows < manifest.splits["validation"].n_docs
    # Of 20 words of a context one is the answer.
    assert scores[0].values["exact-match"] > 0.8
    assert scores[0].values["squad-f1"] >= scores[0].values["exact-match"]
    assert scores[0].intervals["squad-f1"] is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answers": [{"text": "Rome", "answer_start": 10}]}, "does not hold at character 10"),
        ({"answers": [{"text": "oslo", "answer_start": 10}]}, "it is nowhere in it"),
        ({"answers": [{"text": "rome", "answer_start": -1}]}, "has the answer_start -1"),
        ({"answers": [{"text": " ", "answer_start": 0}]}, "an answer without a text"),
        ({"answers": {"text": ["rome"], "answer_start": []}}, 'as many "text" as "answer_start"'),
        ({"answers": None}, 'has no field "answers"'),
        ({"question": ""}, 'has no text in "question"'),
        ({"question": "where is ann " * 3}, "raise --row-tokens, or lower --stride"),
    ],
)
def test_a_wrong_record_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "a.jsonl"
    good = {"question": "where is ann", "context": "ann is in rome .", "answers": []}
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **change}) + "\n")
    options = PrepareOptions(
        (str(path),), tmp_path / "out", tokenizer=str(tokenizer(tmp_path / "t.json")),
        end_of_text="[SEP]", task="question-answering", row_tokens=14, stride=4,
    )  # fmt: skip
    with pytest.raises(DataError, match=rf"a.jsonl line 2 .*{words}"):
        prepare(options, MPI.COMM_SELF, QUIET)


def test_rows_beyond_the_models_context_are_refused(tmp_path: Path) -> None:
    manifest = prepared(tmp_path, MPI.COMM_SELF, squad(4), validation=0.0)
    spec = read_spec({"architecture": "encoder", "head": "span", "context": 12, "vocab_size": 30})
    with pytest.raises(MismatchError, match=r"rows of 14 tokens, and the model reads 12; .* 12"):
        check_task(make_task("question-answering"), spec, manifest)


def test_a_stride_of_a_whole_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--stride 128 leaves no step between rows of 14 tokens"):
        prepared(tmp_path, MPI.COMM_SELF, squad(4), stride=128)
