"""An imported model has the task that it has learnt, and `evaluate` scores it by its metrics."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from mpi4py import MPI

from mpillm.errors import DataError, MismatchError
from mpillm.infer.import_model import import_model
from mpillm.infer.imported_task import imported_task, with_labels
from mpillm.infer.loading import load_trained
from mpillm.infer.print_evaluation import print_evaluation
from mpillm.models.encoder import EncoderConfig
from mpillm.models.encoder_decoder import SHAPES as ENCODER_DECODERS
from mpillm.models.families.family_catalog import family_of
from mpillm.system.console import Console
from mpillm.tasks.vocabulary import Vocabulary
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.tokenizer import byte_tokenizer
from tests.published import SPEC, publish

pytest.importorskip("safetensors")
QUIET = Console(speaks=False)
BERT = EncoderConfig(layers=2, width=32, heads=4, hidden=48, context=16, vocab_size=300)
BERT = BERT.replace(token_types=2)
CLASSES = BERT.replace(head="sequence", head_layer="tanh", classes=3)
WORDS = BERT.replace(head="token", head_layer="none", classes=2)
PICTURES = EncoderConfig(
    layers=2,
    width=32,
    heads=4,
    image_size=2,
    patch_size=1,
    channels=1,
    norm_place="pre",
    embedding_norm=False,
    head="sequence",
    head_layer="none",
    classes=3,
)
T5 = ENCODER_DECODERS["t5-tiny"].replace(
    layers=1, width=32, heads=4, hidden=48, vocab_size=300, context=32, source_context=32
)


def imported(
    folder: Path, comm: MPI.Intracomm, spec: Any, special: tuple[str, ...] = (), **config: Any
) -> Path:
    """Publish a model with a tokenizer of bytes and `special` tokens, and import it."""
    if comm.rank == 0:
        hub = publish(folder / "hub", spec)
        tokenizer = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
        tokenizer.add_special_tokens(list(special))
        (hub / "tokenizer.json").write_text(tokenizer.to_str())
        whole = json.loads((hub / "config.json").read_text())
        (hub / "config.json").write_text(json.dumps({**whole, **config}))
        (hub / "tokenizer_config.json").write_text('{"mask_token": {"content": "<hide>"}}')
        if not spec.vocab_size:
            (hub / "tokenizer.json").unlink()
    comm.Barrier()
    import_model(folder / "hub", folder / "imported", comm, QUIET)
    return folder / "imported"


def prepared(folder: Path, comm: MPI.Intracomm, kind: str, labels: Any = "abc") -> Path:
    """Prepare records with all fields by the tokenizer of the published model."""
    path, out = folder / "records.jsonl", folder / "data"
    if comm.rank == 0:
        rows = [
            {"text": "abc"[n % 3] * 4, "label": labels[n % 3], "image": [[n % 3, 0]] * 2}
            | {"source": "abc"[n % 3] * 4, "target": "de"}
            for n in range(60)
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
    comm.Barrier()
    named = folder / "hub" / "tokenizer.json"
    own = str(named.parent) if named.exists() else "bytes"
    options = PrepareOptions((str(path),), out, tokenizer=own, validation=0.3, task=kind)
    prepare(options, comm, QUIET)
    return out


def scores(run: Path, data: Path, comm: MPI.Intracomm) -> dict[str, Any]:
    """Return what `evaluate --json` prints on rank 0, on all ranks."""
    said = io.StringIO()
    print_evaluation(run, data, False, True, comm, Console(stream=said, speaks=comm.rank == 0))
    found: dict[str, Any] = comm.bcast(json.loads(said.getvalue()) if comm.rank == 0 else None)
    return found["model"]


@pytest.mark.parametrize(
    ("spec", "special", "task"),
    [
        (SPEC, (), {"name": "causal-lm"}),
        (BERT, ("<hide>",), {"name": "masked-lm", "mask_token": "<hide>"}),
        (BERT, ("[MASK]",), {"name": "masked-lm", "mask_token": "[MASK]"}),
        (CLASSES, (), {"name": "sequence-classification"}),
        (WORDS, (), {"name": "token-classification"}),
        (CLASSES.replace(classes=1), (), {"name": "regression"}),
        (BERT.replace(head="span", head_layer="none"), (), {"name": "question-answering"}),
        (PICTURES, (), {"name": "image-classification"}),
        (T5.replace(start_token=257), ("<go>",), {"name": "seq2seq", "start_token": "<go>"}),
    ],
)
def test_the_task_is_that_of_the_head(
    folder: Path, comm: MPI.Intracomm, spec: Any, special: tuple[str, ...], task: dict[str, str]
) -> None:
    loaded = load_trained(imported(folder, comm, spec, special), comm, QUIET)
    assert loaded.checkpoint.facts["recipe"]["task"] == task
    assert loaded.task.name == task["name"]


@pytest.mark.parametrize(
    ("spec", "kind", "metric"),
    [
        (BERT, "", "perplexity"),
        (CLASSES, "sequence-classification", "accuracy"),
        (PICTURES, "image-classification", "accuracy"),
        (T5.replace(start_token=257), "seq2seq", "perplexity"),
    ],
)
def test_it_is_evaluated(
    folder: Path, documents: Path, comm: MPI.Intracomm, spec: Any, kind: str, metric: str
) -> None:
    named = {"id2label": {"0": "a", "1": "b", "2": "c"}} if spec in (CLASSES, PICTURES) else {}
    run = imported(folder, comm, spec, ("[MASK]",), **named)
    data = prepared(folder, comm, kind) if kind else folder / "data"
    if not kind:
        hub = str(folder / "hub")
        prepare(PrepareOptions((str(documents),), data, tokenizer=hub, validation=0.1), comm, QUIET)
    assert scores(run, data, comm)[metric] >= 0


def test_what_is_cut_and_what_has_no_target_is_said(folder: Path, comm: MPI.Intracomm) -> None:
    run = imported(folder, comm, T5.replace(start_token=257, context=2), ("<go>",))
    data, said = prepared(folder, comm, "seq2seq"), io.StringIO()
    print_evaluation(run, data, False, False, comm, Console(stream=said, speaks=comm.rank == 0))
    if comm.rank == 0:
        assert "warning: cut off: " in said.getvalue()
        assert " targets at 2; raise the model's lengths" in " ".join(said.getvalue().split())


def test_a_split_without_a_target_is_refused(folder: Path, comm: MPI.Intracomm) -> None:
    run, text = imported(folder, comm, BERT, ("[MASK]",)), folder / "text.txt"
    if comm.rank == 0:
        text.write_text("abcdefgh\n" * 2)
    comm.Barrier()
    given = {"tokenizer": str(folder / "hub"), "validation": 0.1}
    # Of so few tokens, none is chosen.
    prepare(PrepareOptions((str(text),), folder / "data", **given), comm, QUIET)
    with pytest.raises(DataError, match="no target that counts"):
        print_evaluation(run, folder / "data", False, False, comm, QUIET)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (BERT, "its tokenizer has no token that hides others"),
        (BERT.replace(head="none", head_layer="tanh"), "its head gives no loss"),
    ],
)
def test_a_model_without_a_task_is_refused(
    folder: Path, comm: MPI.Intracomm, spec: EncoderConfig, reason: str
) -> None:
    run = imported(folder, comm, spec)
    with pytest.raises(MismatchError, match=f"cannot be evaluated: {reason}.*train.start_from"):
        print_evaluation(run, folder, False, True, comm, QUIET)


@pytest.mark.parametrize(
    ("names", "labels", "fits"),
    [("cab", "abc", False), ("cab", (0, 1, 2), True), ("", (0, 1, 2), True), ("", "abc", False)],
)
def test_classes_are_those_of_the_model(
    folder: Path, comm: MPI.Intracomm, names: str, labels: Any, fits: bool
) -> None:
    """A file without names has LABEL_0 and so on: only numbers say which is which."""
    own = dict(enumerate(names)) or {number: f"LABEL_{number}" for number in range(3)}
    run = imported(folder, comm, CLASSES, id2label=own)
    data = prepared(folder, comm, "sequence-classification", labels)
    if fits:
        assert 0 <= scores(run, data, comm)["accuracy"] <= 1
        return
    with pytest.raises(MismatchError, match="prepare the data with these numbers as labels"):
        print_evaluation(run, data, False, True, comm, QUIET)


@pytest.mark.parametrize(
    ("spec", "task", "names", "config"),
    [
        (CLASSES, "sequence-classification", ("bad", "fair", "good"), {}),
        (CLASSES, "multi-label-classification", ("art", "law"), {}),
        (CLASSES.replace(classes=1), "regression", (), {}),
        (WORDS, "token-classification", ("O", "B-NAME"), {}),
        # Of another head: what the imported file said of its labels is gone.
        (CLASSES, "multi-label-classification", (), {"id2label": {"0": "x"}, "label2id": {"x": 0}}),
    ],
)
def test_labels_and_the_problem_are_written_and_read(
    spec: EncoderConfig,
    task: str,
    names: tuple[str, ...],
    config: dict[str, Any],
    tmp_path: Path,
    processes: None,
) -> None:
    """Compare with transformers, which reads the file, and with an import of it."""
    auto = pytest.importorskip("transformers").AutoConfig
    family = family_of(spec)
    facts = {"recipe": {"task": {"name": task}}, "classes": list(names)}
    made = with_labels(config, family.config(spec), facts)
    (tmp_path / "config.json").write_text(json.dumps(made))
    theirs = auto.from_pretrained(tmp_path)
    assert theirs.num_labels == spec.classes
    more = [f"LABEL_{number}" for number in range(len(names), spec.classes)]
    assert list(theirs.id2label.values()) == [*names, *more]
    assert theirs.label2id == {name: number for number, name in theirs.id2label.items()}
    problems = {
        "sequence-classification": "single_label_classification",
        "multi-label-classification": "multi_label_classification",
        "regression": "regression",
    }
    assert theirs.problem_type == problems.get(task)
    found, _ = imported_task(spec, Vocabulary(300), {"config.json": json.dumps(made)})
    assert found["name"] == task
    expected = (*names, *more) if names else tuple(str(n) for n in range(spec.classes))
    assert family.class_names(made) == expected


def test_a_class_with_a_name_of_transformers_has_one_number() -> None:
    facts = {"recipe": {"task": {"name": "sequence-classification"}}, "classes": ["x", "LABEL_2"]}
    made = with_labels({}, {"num_labels": 3}, facts)
    assert made["id2label"] == {"0": "x", "1": "LABEL_2", "2": "LABEL_3"}
    assert made["label2id"] == {"x": 0, "LABEL_2": 1, "LABEL_3": 2}


def test_several_numbers_of_a_text_are_no_task_of_ours() -> None:
    texts = {"config.json": json.dumps({"problem_type": "regression"})}
    found, reason = imported_task(CLASSES, Vocabulary(300), texts)
    assert found == {"name": "causal-lm"}
    assert "gives 3 numbers of each text" in reason
