import numpy as np
import pytest

from mpillm.errors import RecipeError
from mpillm.tasks.masked_lm import MaskedLM
from mpillm.tasks.task_catalog import TaskSettings, make_task
from mpillm.tasks.vocabulary import Lengths, Vocabulary

BERT = Vocabulary(1000, 2, {"[CLS]": 1, "[SEP]": 2, "[MASK]": 3})
TOKENS = np.random.default_rng(5).integers(0, 1000, (64, 512)).astype(np.uint16)
KEYS = np.arange(64) * 977 - 5


def made(**settings: object) -> MaskedLM:
    task = make_task("masked-lm", TaskSettings("masked-lm", **settings), BERT, Lengths(512, 512))
    assert isinstance(task, MaskedLM)
    return task


def test_of_the_chosen_80_percent_are_hidden_10_replaced_and_10_left() -> None:
    fields = made(mask_token="[MASK]").fields({"tokens": TOKENS, "keys": KEYS})
    ids, chosen = fields["ids"].numpy(), fields["counts"].numpy()
    assert (ids[~chosen] == TOKENS[~chosen]).all()
    assert (fields["targets"].numpy() == TOKENS).all()
    # Deviations of a binomial of some 32,768 and 4,900 draws: within 4 of them.
    assert chosen.mean() == pytest.approx(0.15, abs=0.008)
    assert (ids[chosen] == 3).mean() == pytest.approx(0.8, abs=0.023)
    assert (ids[chosen] == TOKENS[chosen]).mean() == pytest.approx(0.1, abs=0.018)
    replaced = ids[chosen & (ids != 3) & (ids != TOKENS)]
    assert replaced.mean() == pytest.approx(500, abs=60)


def test_added_tokens_are_never_chosen() -> None:
    chosen = made().fields({"tokens": TOKENS, "keys": KEYS})["counts"].numpy()
    assert not chosen[np.isin(TOKENS, [1, 2, 3])].any()


def test_a_rows_choice_depends_on_its_key_alone() -> None:
    whole = made().fields({"tokens": TOKENS, "keys": KEYS})
    part = made().fields({"tokens": TOKENS[40:43], "keys": KEYS[40:43]})
    assert (part["ids"] == whole["ids"][40:43]).all()
    other = made().fields({"tokens": TOKENS, "keys": KEYS + 1})
    assert (other["counts"] != whole["counts"]).any(1).all()


def test_a_mask_is_named_or_added_after_the_vocabulary() -> None:
    assert made().mask == 1000
    assert made().model_settings(BERT) == {"vocab_size": 1001}
    assert made(mask_token="[MASK]").model_settings(BERT) == {"vocab_size": 1000}
    with pytest.raises(RecipeError, match=r"'<mask>' is no added token .* \[CLS\], \[SEP\]"):
        made(mask_token="<mask>")


def test_documents_and_the_weight_go_with_the_rows() -> None:
    raw = {"tokens": TOKENS, "keys": KEYS, "documents": np.zeros(TOKENS.shape, np.int64)}
    fields = made().fields(raw)
    assert fields["documents"].shape == fields["ids"].shape == TOKENS.shape
    assert made().weight(fields) == fields["counts"].sum()
    assert made().row_tokens(Lengths(512, 512)) == made().positions(512) == 512
