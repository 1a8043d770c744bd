import itertools
import math

import numpy as np
import pytest
import torch

from mpillm.tasks.metrics.token_error_rate import greedy
from mpillm.tasks.task_catalog import make_task
from mpillm.tasks.vocabulary import Vocabulary

RAW = {
    "frames": np.zeros((2, 8, 80), np.float32),
    "source_lengths": np.array([8, 5]),
    "target": np.array([[0, 1, 1], [1, 0, 0]]),
    "target_lengths": np.array([3, 1]),
}


def test_the_loss_is_that_of_all_alignments_one_by_one() -> None:
    task = make_task("ctc")
    fields = task.fields(RAW)
    # Four positions for 8 frames; of 5 frames 3 are real.
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chances = logits.softmax(-1).numpy()
    expected = 0.0
    for row, (length, target) in enumerate([(4, [1, 2, 2]), (3, [2])]):
        paths = itertools.product(range(3), repeat=length)
        matching = [path for path in paths if greedy(np.array(path)) == target]
        total = sum(math.prod(chances[row, t, k] for t, k in enumerate(path)) for path in matching)
        expected -= math.log(total) if total else 0.0
    assert float(task.loss_sum((logits,), fields)) == pytest.approx(expected, rel=1e-5)
    assert task.weight(fields) == 4


def test_tokens_follow_the_blank() -> None:
    task = make_task("ctc")
    assert task.fields(RAW)["targets"].tolist() == [[1, 2, 2], [2, 1, 1]]
    assert task.model_settings(Vocabulary(257)) == {"vocab_size": 258}


def test_a_target_without_an_alignment_has_no_gradient() -> None:
    """The first target needs a blank between its equal tokens: 4 positions, of which 2 are real."""
    task = make_task("ctc")
    fields = task.fields({**RAW, "source_lengths": np.array([4, 8])})
    logits = torch.zeros(2, 4, 3, requires_grad=True)
    task.loss_sum((logits,), fields).backward()
    assert logits.grad is not None
    assert not logits.grad[0].any()
    assert logits.grad[1].any()
