import numpy as np
import torch

from mpillm.tasks.task_catalog import make_task

RAW = {
    "tokens": np.array([[5, 6, 7, 2, 8, 9, 2], [5, 7, 7, 2, 0, 0, 0]]),
    "supervised": np.array([[0, 0, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0, 0]], np.uint8),
    "documents": np.array([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]]),
}


def test_targets_are_one_later_and_count_where_they_are_learnt() -> None:
    fields = make_task("chat").fields(RAW)
    assert fields["ids"].tolist() == RAW["tokens"][:, :-1].tolist()
    assert fields["targets"].tolist() == RAW["tokens"][:, 1:].tolist()
    # The last token of a conversation does not predict the first of the next one.
    assert fields["counts"].tolist() == [
        [False, True, True, False, True, True],
        [True, True, True, False, False, False],
    ]
    assert fields["documents"].tolist() == RAW["documents"][:, :-1].tolist()
    without = {name: array for name, array in RAW.items() if name != "documents"}
    assert "documents" not in make_task("chat").fields(without)


def test_the_loss_is_the_sum_over_learnt_tokens() -> None:
    task = make_task("chat")
    fields = task.fields(RAW)
    logits = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(1))
    losses = -logits.log_softmax(-1).gather(-1, fields["targets"][..., None])[..., 0]
    torch.testing.assert_close(task.loss_sum((logits,), fields), losses[fields["counts"]].sum())
    assert task.weight(fields) == 7
    assert task.fixed_weight(2, 6) is None
