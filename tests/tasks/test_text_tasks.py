"""Numbers and sets of classes of texts: the losses and gradients of transformers' own heads."""

from typing import Any

import numpy as np
import pytest
import torch

from mpillm.errors import MismatchError
from mpillm.infer.task_checks import OF_ROWS
from mpillm.models.model_catalog import read_spec
from mpillm.tasks.task_catalog import make_task
from mpillm.tasks.vocabulary import Vocabulary
from tests.models.families.oracle import adopt, check_gradients, perturb, stored

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS, LENGTHS = np.array([[3, 4, 5, 6], [7, 8, 0, 0], [9, 3, 2, 0]]), np.array([4, 2, 3])
TARGETS = {
    "regression": ("number", np.array([0.5, -1.25, 3.0], np.float32)),
    "multi-label-classification": (
        "classes",
        np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_loss_and_its_gradients_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    key, targets = TARGETS[name]
    classes = targets.shape[1] if targets.ndim == 2 else 1
    problem = name.replace("-", "_")
    config = transformers.BertConfig(**SMALL, num_labels=classes, problem_type=problem)
    theirs = perturb(transformers.BertForSequenceClassification(config)).eval()
    ours = adopt({**config.to_dict(), "architectures": [type(theirs).__name__]}, stored(theirs))
    vocabulary = Vocabulary(40, classes=tuple("abc")[:classes])
    task = make_task(name, vocabulary=vocabulary)
    fields = task.fields({"source": IDS, "source_lengths": LENGTHS, key: targets})
    outputs = ours[2].forward_part(fields, ()).outputs
    loss = task.loss_sum(outputs, fields) / task.weight(fields)
    loss.backward()
    loss = loss.detach()
    mask = torch.from_numpy(np.arange(4) < LENGTHS[:, None])
    wanted = theirs(torch.from_numpy(IDS), mask, labels=torch.from_numpy(targets)).loss
    wanted.backward()
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-5)
    check_gradients(ours, stored(theirs, gradients=True))
    # Rows add up to the whole, whose weight follows from its shape.
    rows = task.row_losses(outputs, fields).detach()
    assert float(rows.sum() / task.weight(fields)) == pytest.approx(float(loss), rel=1e-6)
    assert task.weight(fields) == task.fixed_weight(3, 4)
    assert task.model_settings(vocabulary) == {"vocab_size": 40, "classes": classes}


def test_a_model_of_more_classes_than_the_data_learns_those() -> None:
    task = make_task("multi-label-classification", vocabulary=Vocabulary(9, classes=("a", "b")))
    fields = {"targets": torch.tensor([[1.0, 0.0]])}
    logits = torch.tensor([[2.0, -1.0, 50.0]])
    expected = float(torch.log1p(torch.exp(torch.tensor([-2.0, -1.0]))).sum())
    assert float(task.loss_sum((logits,), fields)) == pytest.approx(expected)


def test_a_model_of_several_numbers_is_no_regression(tmp_path: Any) -> None:
    from mpillm.infer.task_checks import check_task
    from mpillm.tokens.pairs.pair_manifest import PairManifest
    from mpillm.tokens.pairs.pair_shards import PairFormat

    form = PairFormat("regression", "<u2", "<f4")
    manifest = PairManifest(tmp_path, {}, {}, {}, form)
    spec = read_spec({"architecture": "encoder", "head": "sequence", "classes": 3, "vocab_size": 9})
    assert OF_ROWS["a number of each row"] == spec.output_kind
    with pytest.raises(MismatchError, match=r"the model gives 3; set model\.classes = 1"):
        check_task(make_task("regression"), spec, manifest)
    check_task(make_task("regression"), spec.replace(classes=1), manifest)
