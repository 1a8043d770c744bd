import numpy as np
import pytest
import torch

from mpillm.tasks.causal_lm import CausalLM
from mpillm.tasks.cross_entropy import cross_entropy_sum

TOKENS = np.array([[5, 6, 7, 8], [1, 2, 3, 4]], np.uint16)


def test_targets_are_one_position_later() -> None:
    fields = CausalLM().fields({"tokens": TOKENS})
    assert set(fields) == set(CausalLM.field_names)
    assert fields["ids"].tolist() == [[5, 6, 7], [1, 2, 3]]
    assert fields["targets"].tolist() == [[6, 7, 8], [2, 3, 4]]
    assert fields["ids"].dtype == torch.int64


def test_document_numbers_are_those_of_the_ids() -> None:
    documents = np.array([[0, 0, 1, 1], [0, 1, 1, 2]])
    fields = CausalLM().fields({"tokens": TOKENS, "documents": documents})
    assert fields["documents"].tolist() == [[0, 0, 1], [0, 1, 1]]


def test_the_loss_is_the_sum_over_all_targets() -> None:
    fields = CausalLM().fields({"tokens": TOKENS})
    logits = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    by_hand = -sum(
        float(logits[b, t].log_softmax(-1)[fields["targets"][b, t]])
        for b in range(2)
        for t in range(3)
    )
    assert float(CausalLM().loss_sum((logits,), fields)) == pytest.approx(by_hand, rel=1e-6)
    half = cross_entropy_sum(logits.bfloat16(), fields["targets"])
    assert half.dtype == torch.float32


def test_the_weight_counts_targets_and_follows_from_the_shape() -> None:
    task = CausalLM()
    assert task.weight(task.fields({"tokens": TOKENS})) == 6.0
    assert task.fixed_weight(2, 3) == 6.0
