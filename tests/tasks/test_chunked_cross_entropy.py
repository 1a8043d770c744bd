"""The loss in chunks compared with the plain one: value, gradients, halves, memory."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mpillm.bench.tensor_peak import peak_tensor_bytes
from mpillm.models import head_chunks
from mpillm.models.head_chunks import chunk_positions, head_bytes, tile_positions
from mpillm.models.linear_head import LinearHead
from mpillm.parallel.pipeline.split_backward import SplitBackward
from mpillm.tasks import chunked_cross_entropy as module
from mpillm.tasks.chunked_cross_entropy import chunked_cross_entropy

B, T, C, V = 3, 7, 16, 50


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks of 6 positions, tiles of 2 and parts of 20 tokens: none divides the whole."""
    monkeypatch.setattr(head_chunks, "CPU_CHUNK_BYTES", 6 * V * 4)
    monkeypatch.setattr(head_chunks, "TILE_BYTES", 2 * V * 4)
    monkeypatch.setattr(module, "NARROW_ROWS", 20)
    assert chunk_positions(B * T, V) == 6


class Case(NamedTuple):
    dtype: torch.dtype = torch.float32
    bias: bool = False
    counted: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    soft_cap: float = 0.0


CASES = [
    Case(dtype, *others)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for others in (
        (False, False, 0.0, 0.0),
        (True, False, 0.1, 0.0),
        (False, True, 0.0, 1e-2),
        (True, True, 0.1, 1e-2),
        (True, True, 0.1, 1e-2, 1.5),
    )
]
# Of values and gradients in float64. 16 bits round each logit and its gradient once.
CLOSE = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}


def make(case: Case) -> tuple[LinearHead, Tensor, Tensor | None]:
    """Return leaves, targets and counts. A target that does not count is no token at all."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int, deviation: float = 1.0) -> Tensor:
        values = deviation * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(case.dtype).requires_grad_()

    hidden_BTC, weight_VC = leaf(B, T, C), leaf(V, C, deviation=0.3)
    head = LinearHead(hidden_BTC, weight_VC, leaf(V) if case.bias else None, case.soft_cap)
    targets_BT = torch.randint(V, (B, T), generator=generator)
    if not case.counted:
        return head, targets_BT, None
    counts_BT = torch.rand(B, T, generator=generator) < 0.6
    return head, targets_BT.masked_fill(~counts_BT, -100), counts_BT


def by_definition(head: LinearHead, targets_BT: Tensor, counts_BT: Tensor | None, case: Case):
    """Compute the loss from the definition, by torch's cross_entropy over all logits."""
    logits_NV = F.linear(*head.tensors).flatten(0, 1)
    if case.soft_cap:
        logits_NV = case.soft_cap * (logits_NV / case.soft_cap).tanh()
    losses_N = F.cross_entropy(
        logits_NV,
        targets_BT.flatten(),
        reduction="none",
        ignore_index=-100,
        label_smoothing=case.label_smoothing,
    )
    z_N = case.z_loss * logits_NV.exp().sum(1).log() ** 2
    return (losses_N + (z_N if counts_BT is None else z_N * counts_BT.flatten())).sum()


def widened(head: LinearHead) -> LinearHead:
    """Copy the leaves of a head in float64."""
    return LinearHead(
        *(x if x is None else x.detach().double().requires_grad_() for x in head.tensors),
        head.soft_cap,
    )


def differ(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() - other.detach()).norm() / other.detach().norm())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients_are_those_of_all_logits_in_float64(case: Case) -> None:
    head, targets_BT, counts_BT = make(case)
    exact = widened(head)
    terms = case.label_smoothing, case.z_loss
    loss = chunked_cross_entropy(head, targets_BT, counts_BT, *terms)
    expected = by_definition(exact, targets_BT, counts_BT, case)
    assert loss.dtype == torch.promote_types(case.dtype, torch.float32)
    assert differ(loss, expected) < CLOSE[case.dtype]
    # A factor as of a mean with loss scaling.
    (loss * 0.37).backward()
    (expected * 0.37).backward()
    for tensor, other in zip(head.tensors, exact.tensors, strict=True):
        if tensor is not None:
            assert tensor.grad.dtype == case.dtype
            assert differ(tensor.grad, other.grad) < CLOSE[case.dtype]
    with torch.inference_mode():
        assert torch.equal(chunked_cross_entropy(head, targets_BT, counts_BT, *terms), loss)


def test_all_chunks_at_once_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    head, targets_BT, _ = make(Case())
    chunked_cross_entropy(head, targets_BT).backward()
    found = [head.hidden_BTC.grad, head.weight_VC.grad]
    monkeypatch.setattr(head_chunks, "CPU_CHUNK_BYTES", 1 << 20)
    again, _, _ = make(Case())
    chunked_cross_entropy(again, targets_BT).backward()
    torch.testing.assert_close([again.hidden_BTC.grad, again.weight_VC.grad], found)


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_sums_over_chunks_are_in_float32(lower: torch.dtype) -> None:
    """1,000 equal positions: a sum in 16 bits would stop to grow."""
    hidden_BTC = torch.ones(1, 1000, 4, dtype=lower)
    weight_VC = torch.zeros(V, 4, dtype=lower, requires_grad=True)
    loss = chunked_cross_entropy(
        LinearHead(hidden_BTC, weight_VC), torch.zeros(1, 1000, dtype=torch.int64)
    )
    assert float(loss.detach()) == pytest.approx(1000 * np.log(V), rel=1e-5)
    loss.backward()
    assert float(weight_VC.grad[0, 0]) == pytest.approx(1000 * (1 / V - 1), rel=5e-3)
    assert float(weight_VC.grad[1, 0]) == pytest.approx(1000 / V, rel=5e-3)


def test_many_equal_targets_do_not_overflow_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """40,000 positions in one chunk: their product with the states is above 65,504."""
    monkeypatch.setattr(head_chunks, "CPU_CHUNK_BYTES", 128 << 20)
    hidden_BTC = torch.full((1, 40_000, 4), 4.0, dtype=torch.float16)
    weight_VC = torch.zeros(V, 4, dtype=torch.float16, requires_grad=True)
    targets_BT = torch.zeros(1, 40_000, dtype=torch.int64)
    loss = chunked_cross_entropy(LinearHead(hidden_BTC, weight_VC), targets_BT)
    (loss / 40_000).backward()
    expected = 4.0 * (1 / V - (torch.arange(V) == 0).double())
    torch.testing.assert_close(
        weight_VC.grad, expected[:, None].expand(V, 4).half(), rtol=2e-3, atol=0
    )


def test_a_small_factor_is_not_lost_in_float16() -> None:
    """The factor 1 / (all targets) alone is denormal there, times the loss scale it is not."""
    head, targets_BT, _ = make(Case(torch.float16))
    exact, _, _ = make(Case())
    for each in (head, exact):
        (chunked_cross_entropy(each, targets_BT) / 3e6 * 65536.0).backward()
    assert differ(head.weight_VC.grad, exact.weight_VC.grad.double()) < 5e-3
    assert differ(head.hidden_BTC.grad, exact.hidden_BTC.grad.double()) < 5e-3


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_required_are_computed(wanted: tuple[bool, bool]) -> None:
    head, targets_BT, _ = make(Case())
    for tensor, required in zip(head, wanted, strict=False):
        tensor.requires_grad_(required)
    loss = chunked_cross_entropy(head, targets_BT)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    assert [tensor.grad is not None for tensor in head[:2]] == list(wanted)


@pytest.mark.parametrize("apart", [False, True], ids=["one Parameter", "another leaf"])
def test_a_tied_head_adds_to_the_gradient_of_the_embedding(apart: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    ids_BT = torch.randint(V, (B, T), generator=generator)
    weight = torch.nn.Parameter(0.3 * torch.randn(V, C, generator=generator))
    head_weight = torch.nn.Parameter(weight.data) if apart else weight
    hidden_BTC = F.embedding(ids_BT, weight).tanh()
    chunked_cross_entropy(LinearHead(hidden_BTC, head_weight), ids_BT.roll(1, 1)).backward()
    found = weight.grad + head_weight.grad if apart else weight.grad
    other = weight.detach().clone().requires_grad_()
    logits = F.linear(F.embedding(ids_BT, other).tanh(), other).flatten(0, 1)
    F.cross_entropy(logits, ids_BT.roll(1, 1).flatten(), reduction="sum").backward()
    torch.testing.assert_close(found, other.grad)


def test_a_tile_has_a_position_on_any_device() -> None:
    assert [tile_positions(0, V, "cuda"), tile_positions(7, V, "cuda")] == [1, 7]


def test_without_positions_loss_and_gradients_are_zero() -> None:
    head, targets_BT, _ = make(Case(bias=True))
    empty = head._replace(hidden_BTC=head.hidden_BTC[:0])
    loss = chunked_cross_entropy(empty, targets_BT[:0])
    loss.backward()
    assert float(loss.detach()) == 0
    assert not any(tensor.grad.any() for tensor in head.tensors)


def test_gradients_of_microbatches_add_up() -> None:
    head, targets_BT, _ = make(Case())
    for part in (slice(0, 1), slice(1, 3)):
        chunked_cross_entropy(
            head._replace(hidden_BTC=head.hidden_BTC[part]), targets_BT[part]
        ).backward()
    whole, _, _ = make(Case())
    chunked_cross_entropy(whole, targets_BT).backward()
    torch.testing.assert_close(head.weight_VC.grad, whole.weight_VC.grad)
    torch.testing.assert_close(head.hidden_BTC.grad, whole.hidden_BTC.grad)


@pytest.mark.parametrize("case", [Case(), Case(torch.bfloat16, True, True, 0.1, 1e-2)], ids=str)
def test_two_halves_have_the_bits_of_one_whole(case: Case) -> None:
    found = []
    for split in (False, True):
        head, targets_BT, counts_BT = make(case)
        pivot = head.hidden_BTC.detach().requires_grad_()
        scaled = head._replace(hidden_BTC=pivot * 1.5)
        loss = chunked_cross_entropy(scaled, targets_BT, counts_BT, *case[3:5]) / 11
        if split:
            halves = SplitBackward((loss,), (pivot,))
            (gradient,) = halves.input((None,))
            assert head.weight_VC.grad is None
            halves.weights()
        else:
            loss.backward()
            gradient = pivot.grad
        found.append([gradient, *(x.grad for x in head.tensors[1:] if x is not None)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_weight_s_gradient_is_given_once() -> None:
    head, targets_BT, _ = make(Case())
    loss = chunked_cross_entropy(head, targets_BT)
    loss.backward(retain_graph=True)
    kept = head.weight_VC.grad.clone()
    with pytest.raises(AssertionError, match="used up by a backward pass"):
        loss.backward()
    assert torch.equal(head.weight_VC.grad, kept)


def test_autocast_changes_no_dtype() -> None:
    head, targets_BT, _ = make(Case())
    expected = chunked_cross_entropy(head, targets_BT)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chunked_cross_entropy(head, targets_BT), expected)


def test_a_head_in_float32_computes_in_the_dtype_of_the_hidden_states() -> None:
    head, targets_BT, _ = make(Case(bias=True))
    lower = head._replace(hidden_BTC=head.hidden_BTC.detach().bfloat16().requires_grad_())
    loss = chunked_cross_entropy(lower, targets_BT)
    loss.backward()
    same = LinearHead(*(x.detach().bfloat16() for x in head.tensors))
    assert torch.equal(chunked_cross_entropy(same, targets_BT), loss.detach())
    assert [x.grad.dtype for x in lower.tensors] == [torch.bfloat16, torch.float32, torch.float32]


def test_the_peak_is_one_chunk_and_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    positions, width, vocabulary = 1024, 16, 2000
    monkeypatch.setattr(head_chunks, "CPU_CHUNK_BYTES", 64 * vocabulary * 4)
    generator = torch.Generator().manual_seed(3)
    targets_BT = torch.randint(vocabulary, (1, positions), generator=generator)

    def leaves() -> LinearHead:
        shapes = ((1, positions, width), (vocabulary, width))
        return LinearHead(*(torch.randn(s, generator=generator).requires_grad_() for s in shapes))

    chunks, all_logits, scored = leaves(), leaves(), leaves()

    def plain() -> None:
        logits_NV = F.linear(*all_logits.tensors).flatten(0, 1)
        F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="sum").backward()

    def score() -> None:
        with torch.inference_mode():
            chunked_cross_entropy(scored, targets_BT)

    needed = head_bytes(positions, width, vocabulary)
    peak = peak_tensor_bytes(lambda: (chunked_cross_entropy(chunks, targets_BT) / 7).backward())
    assert 0.9 * needed < peak < 1.1 * needed
    assert peak < 0.15 * peak_tensor_bytes(plain)
    assert peak_tensor_bytes(score) < 1.1 * 64 * vocabulary * 4
    # A soft cap holds one more chunk, of its slopes.
    capped = leaves()._replace(soft_cap=30.0)
    peak = peak_tensor_bytes(lambda: (chunked_cross_entropy(capped, targets_BT) / 7).backward())
    assert 0.9 < peak / (needed + 64 * vocabulary * 4) < 1.1
