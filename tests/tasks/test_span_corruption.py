import numpy as np
import pytest

from mpillm.errors import RecipeError
from mpillm.tasks.span_corruption import SpanCorruption, sentinel_ids
from mpillm.tasks.task_catalog import TaskSettings
from mpillm.tasks.vocabulary import Lengths, Vocabulary

T5 = Vocabulary(400, 1, {"<pad>": 0, "</s>": 1, **{f"<extra_id_{n}>": 399 - n for n in range(100)}})
LENGTHS = Lengths(114, 512)


def made(lengths: Lengths = LENGTHS, **settings: float) -> SpanCorruption:
    return SpanCorruption(TaskSettings("span-corruption", **settings), T5, lengths)


def restored(source: list[int], target: list[int]) -> list[int]:
    """Put each span of the target back in place of its sentinel: the slow reference."""
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token >= 300:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert list(spans) == [399 - n for n in range(len(spans))]
    return [inner for token in source[:-1] for inner in spans.get(token, [token])]


def test_source_and_target_make_the_row_again() -> None:
    task = made()
    # T5's own numbers: 568 tokens become 512 of source and 114 of target.
    assert task.row_tokens(LENGTHS) == 568
    tokens = np.random.default_rng(1).integers(2, 300, (6, 568))
    fields = task.fields({"tokens": tokens, "keys": np.arange(6)})
    assert fields["source"].shape == (6, 512)
    assert fields["targets"].shape == (6, 114)
    assert fields["counts"].all()
    assert task.weight(fields) == task.fixed_weight(6, 114)
    for row in range(6):
        source, target = fields["source"][row].tolist(), fields["targets"][row].tolist()
        assert source[-1] == target[-1] == T5.end_of_text
        assert restored(source, target) == tokens[row].tolist()
        assert fields["ids"][row].tolist() == [0, *target[:-1]]


def test_a_short_row_is_padded() -> None:
    tokens = np.arange(2, 12)[None]
    fields = made().fields({"tokens": tokens, "keys": np.array([9])})
    source, target = int(fields["source_lengths"][0]), int(fields["counts"].sum())
    assert not fields["source"][0, source:].any()
    assert not fields["targets"][0, target:].any()
    row = fields["source"][0, :source].tolist(), fields["targets"][0, :target].tolist()
    assert restored(*row) == tokens[0].tolist()


def test_spans_are_a_function_of_the_key() -> None:
    tokens = np.tile(np.arange(2, 220), (50, 1))
    sources = made().fields({"tokens": tokens, "keys": np.arange(50)})["source"]
    again = made().fields({"tokens": tokens[7:8], "keys": np.array([7])})["source"]
    assert (again == sources[7:8]).all()
    assert len({tuple(row) for row in sources.tolist()}) == 50
    # Each place but the first, which is kept, is hidden about as often.
    hidden = [not (sources == token).any(1).all() for token in range(3, 220)]
    assert sum(hidden) > 200


def test_sentinels_follow_the_vocabulary_where_it_has_none() -> None:
    assert sentinel_ids(Vocabulary(257)).tolist() == list(range(257, 357))
    assert sentinel_ids(T5)[:3].tolist() == [399, 398, 397]
    assert made().model_settings(Vocabulary(257)) == {"vocab_size": 400}


def test_lengths_without_a_row_are_refused() -> None:
    with pytest.raises(RecipeError, match="needs 1 to 100 spans a row"):
        made(Lengths(2, 512))
    with pytest.raises(RecipeError, match="needs 1 to 100 spans a row"):
        made(Lengths(4096, 4096), span_length=1.0)
