"""The three tasks of classes: of a text, of its words, of a picture."""

import numpy as np
import pytest
import torch

from mpillm.tasks.task_catalog import make_task
from mpillm.tasks.vocabulary import Vocabulary

VOCABULARY = Vocabulary(30, 2, classes=("a", "b", "c"))
TEXTS = {"source": np.array([[4, 5, 6], [7, 0, 0]]), "source_lengths": np.array([3, 1])}


def test_a_text_has_one_target() -> None:
    task = make_task("sequence-classification")
    fields = task.fields({**TEXTS, "label": np.array([2, 0])})
    assert fields["ids"].tolist() == TEXTS["source"].tolist()
    assert fields["lengths"].tolist() == [3, 1]
    logits = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]])
    expected = -sum(float(logits[row].log_softmax(0)[label]) for row, label in ((0, 2), (1, 0)))
    assert float(task.loss_sum((logits,), fields)) == pytest.approx(expected)
    assert task.weight(fields) == task.fixed_weight(2, 3) == 2
    assert task.model_settings(VOCABULARY) == {"vocab_size": 30, "classes": 3}


def test_a_word_counts_once() -> None:
    task = make_task("token-classification")
    fields = task.fields({**TEXTS, "labels": np.array([[1, -1, 2], [0, -1, -1]])})
    logits = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(2))
    rows = [(0, 0, 1), (0, 2, 2), (1, 0, 0)]
    expected = -sum(float(logits[b, t].log_softmax(0)[label]) for b, t, label in rows)
    assert float(task.loss_sum((logits,), fields)) == pytest.approx(expected)
    assert task.weight(fields) == 3


def test_pixels_of_bytes_become_minus_1_to_1() -> None:
    task = make_task("image-classification")
    label = np.array([1])
    pixels = task.fields({"pixels": np.array([[[[0, 51, 255]]]], np.uint8), "label": label})
    assert pixels["pixels"].flatten().tolist() == pytest.approx([-1, -0.6, 1])
    given = np.array([[[[0.5, 7.0]]]], np.float32)
    assert task.fields({"pixels": given, "label": label})["pixels"].tolist() == given.tolist()
    assert task.model_settings(VOCABULARY) == {"classes": 3}
