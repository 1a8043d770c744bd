"""A task, its data and its model fit each other, or a run ends before its first step."""

from pathlib import Path
from typing import Any

import pytest

from mpillm.errors import MismatchError
from mpillm.infer.task_checks import check_task
from mpillm.models.model_catalog import named_shapes
from mpillm.tasks.task_catalog import TaskSettings, make_task
from mpillm.tasks.vocabulary import Lengths, Vocabulary
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.pairs.pair_manifest import PairManifest
from mpillm.tokens.pairs.pair_shards import PairFormat

FOLDER = Path("data")
TEXT = Manifest(FOLDER, {}, {}, {})
DIGITS, FRAMES = (1, 8, 8), (80,)


def pairs(kind: str, item: tuple[int, ...] = ()) -> PairManifest:
    return PairManifest(FOLDER, {}, {}, {}, PairFormat(kind, "<u2", "<u2", item))


def check(name: str, shape: str, data: Manifest, **settings: Any) -> None:
    spec = named_shapes()[shape].replace(**settings)
    task = make_task(name, TaskSettings(name), Vocabulary(300), Lengths.of(spec))
    check_task(task, spec, data)


@pytest.mark.parametrize(
    ("name", "shape", "data", "settings"),
    [
        ("causal-lm", "tiny", TEXT, {}),
        ("masked-lm", "bert-tiny", TEXT, {}),
        ("span-corruption", "t5-tiny", TEXT, {}),
        ("seq2seq", "t5-tiny", pairs("seq2seq"), {}),
        ("seq2seq", "whisper-tiny", pairs("speech-to-text", FRAMES), {}),
        ("sequence-classification", "bert-tiny-classes", pairs("sequence-classification"), {}),
        ("sequence-classification", "lstm", pairs("sequence-classification"), {}),
        ("token-classification", "bert-tiny", pairs("token-classification"), {"head": "token"}),
        ("image-classification", "vit-tiny-digits", pairs("image-classification", DIGITS), {}),
        ("image-classification", "cnn", pairs("image-classification", DIGITS), {"image_size": 8}),
        ("ctc", "sound-tiny", pairs("ctc", FRAMES), {}),
    ],
)
def test_a_task_with_its_model_and_data_fits(
    name: str, shape: str, data: Manifest, settings: dict[str, Any]
) -> None:
    check(name, shape, data, **settings)


@pytest.mark.parametrize(
    ("name", "shape", "data", "words"),
    [
        ("causal-lm", "bert-tiny", TEXT, "learns next tokens.*encoder gives hidden tokens"),
        ("causal-lm", "t5-tiny", TEXT, "encoder-decoder gives next tokens of a target"),
        ("masked-lm", "lstm", TEXT, "lstm gives a class of each row"),
        ("seq2seq", "tiny", pairs("seq2seq"), "decoder gives next tokens"),
        ("ctc", "whisper-tiny", pairs("ctc", FRAMES), "learns aligned tokens"),
        ("token-classification", "bert-tiny", pairs("token-classification"), "model.head"),
        ("masked-lm", "bert-tiny", pairs("seq2seq"), "holds pairs of the task seq2seq"),
        ("seq2seq", "whisper-tiny", pairs("seq2seq"), "holds text, and the model reads sound"),
        ("seq2seq", "t5-tiny", pairs("speech-to-text", FRAMES), "holds sound.*reads text"),
        (
            "image-classification",
            "lstm",
            pairs("image-classification", DIGITS),
            "holds pictures, and the model reads text",
        ),
        (
            "image-classification",
            "vit-tiny-digits",
            pairs("image-classification", (3, 8, 8)),
            r"\(3, 8, 8\), and the model reads \(1, 8, 8\); set model.channels",
        ),
        ("ctc", "sound-tiny", pairs("ctc", (40,)), r"\(40,\), and the model reads \(80,\)"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, shape: str, data: Manifest, words: str) -> None:
    with pytest.raises(MismatchError, match=words):
        check(name, shape, data)
