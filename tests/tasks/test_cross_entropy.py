import pytest
import torch
from torch import Tensor

from mpillm.models.linear_head import LinearHead
from mpillm.tasks import chunked_cross_entropy
from mpillm.tasks.causal_lm import CausalLM
from mpillm.tasks.cross_entropy import CrossEntropyTask, cross_entropy_sum

TERMS = {"label_smoothing": 0.1, "z_loss": 1e-2}


def head_and_fields() -> tuple[LinearHead, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    head = LinearHead(torch.randn(2, 5, 8, generator=generator), torch.randn(20, 8))
    targets_BT = torch.randint(20, (2, 5), generator=generator)
    return head, {"targets": targets_BT, "counts": torch.rand(2, 5, generator=generator)}


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("terms", [{}, TERMS], ids=["plain", "terms"])
def test_a_head_and_its_logits_have_the_same_loss(terms: dict[str, float], counted: bool) -> None:
    head, fields = head_and_fields()
    counts_BT = fields["counts"] if counted else None
    read, plain = (
        cross_entropy_sum(output, fields["targets"], counts_BT, **terms)
        for output in (head, head.logits())
    )
    torch.testing.assert_close(read, plain)


def test_the_terms_are_those_of_their_papers() -> None:
    logits_BTV, targets_BT = torch.randn(1, 3, 20), torch.tensor([[4, 0, 19]])
    log_p_BTV = logits_BTV.log_softmax(-1)
    wanted_BTV = 0.1 / 20 + 0.9 * torch.nn.functional.one_hot(targets_BT, 20)
    squares = logits_BTV.exp().sum(-1).log().square().sum()
    expected = -(wanted_BTV * log_p_BTV).sum() + 1e-2 * squares
    torch.testing.assert_close(cross_entropy_sum(logits_BTV, targets_BT, None, 0.1, 1e-2), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_is_float32_whatever_the_logits(dtype: torch.dtype) -> None:
    head, fields = head_and_fields()
    assert cross_entropy_sum(head.logits().to(dtype), fields["targets"]).dtype == torch.float32


def test_the_terms_are_of_training_alone() -> None:
    head, fields = head_and_fields()
    plain, task = CausalLM(), CausalLM(**TERMS)
    assert torch.equal(task.loss_sum((head,), fields), plain.loss_sum((head,), fields))
    assert torch.equal(plain.objective_sum((head,), fields), plain.loss_sum((head,), fields))
    expected = cross_entropy_sum(head, fields["targets"], fields["counts"], **TERMS)
    assert torch.equal(task.objective_sum((head,), fields), expected)
    assert float(expected) > float(plain.loss_sum((head,), fields))


def test_a_loss_of_ones_own_is_trained_on() -> None:
    class Doubled(CausalLM):
        def loss_sum(self, outputs, fields):
            return 2 * super().loss_sum(outputs, fields)

    head, fields = head_and_fields()
    expected = 2 * CausalLM().loss_sum((head,), fields)
    assert torch.equal(Doubled().objective_sum((head,), fields), expected)


class OfRows(CrossEntropyTask):
    """The fields are given: losses alone are of interest."""

    name = "of rows"

    def fields(self, raw):
        return dict(raw)


class Halved(OfRows):
    def loss_sum(self, outputs, fields):
        return super().loss_sum(outputs, fields) / 2


@pytest.mark.parametrize("counted", [False, True])
def test_the_losses_of_rows_are_those_of_each_row_alone(
    monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    head, fields = head_and_fields()
    if not counted:
        del fields["counts"]
    rows = [{name: each[row : row + 1] for name, each in fields.items()} for row in (0, 1)]
    heads = [head._replace(hidden_BTC=head.hidden_BTC[row : row + 1]) for row in (0, 1)]
    expected = torch.stack([OfRows().loss_sum((h,), f) for h, f in zip(heads, rows, strict=True)])
    for output in (head, head.logits()):
        torch.testing.assert_close(OfRows().row_losses((output,), fields), expected)
    torch.testing.assert_close(Halved().row_losses((head,), fields), expected / 2)
    # Of a head the logits never exist at once.
    monkeypatch.setattr(chunked_cross_entropy, "chunk_positions", lambda *_: 9)
    monkeypatch.setattr(LinearHead, "logits", None)
    torch.testing.assert_close(OfRows().row_losses((head,), fields), expected)


def test_rows_of_classes_and_rows_without_positions_have_losses() -> None:
    logits_BV, targets_B = torch.randn(6, 4), torch.arange(6) % 4
    losses_B = OfRows().row_losses((logits_BV,), {"targets": targets_B})
    torch.testing.assert_close(
        losses_B.sum(), OfRows().loss_sum((logits_BV,), {"targets": targets_B})
    )
    none = {"targets": torch.zeros(3, 0, dtype=torch.long)}
    assert OfRows().row_losses((torch.zeros(3, 0, 4),), none).tolist() == [0, 0, 0]
