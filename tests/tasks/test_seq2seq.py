import numpy as np
import pytest
import torch

from mpillm.errors import RecipeError
from mpillm.tasks.task_catalog import TaskSettings, make_task
from mpillm.tasks.vocabulary import Vocabulary

RAW = {
    "source": np.array([[5, 6, 0], [7, 0, 0]]),
    "source_lengths": np.array([2, 1]),
    "target": np.array([[8, 9, 1, 0], [9, 1, 0, 0]]),
    "target_lengths": np.array([3, 2]),
}
T5 = Vocabulary(20, 1, {"<pad>": 0, "</s>": 1, "<|start|>": 3})


def test_a_decoder_reads_the_start_and_what_it_has_written() -> None:
    fields = make_task("seq2seq", vocabulary=T5).fields(RAW)
    assert fields["ids"].tolist() == [[0, 8, 9, 1], [0, 9, 1, 0]]
    assert fields["targets"].tolist() == RAW["target"].tolist()
    assert fields["counts"].tolist() == [[True, True, True, False], [True, True, False, False]]
    assert fields["source"].tolist() == RAW["source"].tolist()
    assert fields["source_lengths"].tolist() == [2, 1]


def test_the_loss_is_that_of_the_real_targets_alone() -> None:
    task = make_task("seq2seq", vocabulary=T5)
    fields = task.fields(RAW)
    logits = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(1))
    rows = [(0, 0, 8), (0, 1, 9), (0, 2, 1), (1, 0, 9), (1, 1, 1)]
    expected = -sum(float(logits[b, t].log_softmax(0)[token]) for b, t, token in rows)
    assert float(task.loss_sum((logits,), fields)) == pytest.approx(expected)
    assert task.weight(fields) == 5


def test_the_start_is_named_or_the_padding_or_the_end_of_text() -> None:
    def first(vocabulary: Vocabulary, **settings: str) -> int:
        task = make_task("seq2seq", TaskSettings("seq2seq", **settings), vocabulary)
        return int(task.fields(RAW)["ids"][0, 0])

    assert first(T5, start_token="<|start|>") == 3
    assert first(Vocabulary(20, 7)) == 7
    with pytest.raises(RecipeError, match=r"start_token = '<s>' is no added token .*<pad>, </s>"):
        first(T5, start_token="<s>")


def test_sound_is_a_source_too() -> None:
    raw = {name: array for name, array in RAW.items() if name != "source"}
    frames = np.zeros((2, 4, 80), np.float32)
    fields = make_task("seq2seq", vocabulary=T5).fields({**raw, "frames": frames})
    assert fields["frames"].shape == (2, 4, 80)
    # Two frames become one position.
    assert fields["source_lengths"].tolist() == [1, 1]
    assert "source" not in fields
