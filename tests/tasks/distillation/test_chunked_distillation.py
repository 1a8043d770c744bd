"""The mixed loss of a student compared with its formula over all logits in float64."""

import threading
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mpillm.bench.tensor_peak import peak_tensor_bytes
from mpillm.models import head_chunks
from mpillm.models.linear_head import LinearHead, VocabularyShard
from mpillm.tasks.cross_entropy import CrossEntropyTask
from mpillm.tasks.distillation.teacher_rows import TeacherRows
from tests.tasks.test_shard_losses import SHARDS, Heads

B, T, C, V, WIDER = 3, 7, 16, 50, 24


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks of 6 positions and tiles of 2: neither divides the whole."""
    monkeypatch.setattr(head_chunks, "CPU_CHUNK_BYTES", 6 * V * 4)
    monkeypatch.setattr(head_chunks, "TILE_BYTES", 2 * V * 4)


class Learner(CrossEntropyTask):
    """A task of targets that are given."""

    name = "given"

    def fields(self, raw: object) -> dict[str, Tensor]:
        raise NotImplementedError


class Case(NamedTuple):
    alpha: float = 0.5
    temperature: float = 2.0
    top_k: int = 0
    counted: bool = False
    smoothing: float = 0.0
    z_loss: float = 0.0
    cap: float = 0.0
    bias: bool = False


CASES = [
    Case(),
    Case(1.0, 1.0),
    Case(0.0, 3.0, counted=True),
    Case(0.3, 4.0, counted=True, smoothing=0.1, z_loss=1e-2, cap=1.5, bias=True),
    Case(0.7, 0.5, top_k=5, counted=True),
    Case(0.5, 2.0, top_k=V + 1, smoothing=0.2),
]
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Made(NamedTuple):
    student: LinearHead
    teacher: LinearHead
    fields: dict[str, Tensor]


def make(case: Case, dtype: torch.dtype) -> Made:
    """Return leaves of a student, a wider teacher, targets and counts."""
    generator = torch.Generator().manual_seed(1)

    def values(*shape: int, deviation: float = 1.0) -> Tensor:
        drawn = deviation * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(dtype)

    student = LinearHead(
        values(B, T, C).requires_grad_(),
        values(V, C, deviation=0.5).requires_grad_(),
        values(V).requires_grad_() if case.bias else None,
        case.cap,
    )
    teacher = LinearHead(
        values(B, T, WIDER), values(V, WIDER, deviation=0.5), values(V) if case.bias else None, 3.0
    )
    fields = {"targets": torch.randint(V, (B, T), generator=generator)}
    if case.counted:
        counts_BT = torch.rand(B, T, generator=generator) < 0.6
        fields |= {"counts": counts_BT, "targets": fields["targets"].masked_fill(~counts_BT, -100)}
    return Made(student, teacher, fields)


def by_definition(made: Made, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss and its parts over all logits, in their dtype, by torch's own functions."""
    z_NV, y_NV = (head.logits().flatten(0, 1) for head in (made.student, made.teacher))
    counts_BT = made.fields.get("counts", torch.ones(B, T))
    counts_N = counts_BT.flatten().to(z_NV.dtype)
    task_N = F.cross_entropy(
        z_NV,
        made.fields["targets"].flatten(),
        reduction="none",
        ignore_index=-100,
        label_smoothing=case.smoothing,
    )
    task_N = task_N + case.z_loss * z_NV.logsumexp(1) ** 2
    if 0 < case.top_k < V:
        least_N1 = y_NV.topk(case.top_k).values[:, -1:]
        y_NV = y_NV.masked_fill(y_NV < least_N1, -torch.inf)
    p_NV = (y_NV / case.temperature).softmax(1)
    q_NV = (z_NV / case.temperature).log_softmax(1)
    divergence_N = (torch.special.xlogy(p_NV, p_NV) - p_NV * q_NV).sum(1)
    task, divergence = (task_N * counts_N).sum(), (divergence_N * counts_N).sum()
    loss = (1 - case.alpha) * task + case.alpha * case.temperature**2 * divergence
    return loss, task, divergence


def widened(made: Made) -> Made:
    """Copy the leaves in float64."""
    heads = (
        head._replace(
            hidden_BTC=head.hidden_BTC.detach().double(),
            weight_VC=head.weight_VC.detach().double(),
            bias_V=None if head.bias_V is None else head.bias_V.detach().double(),
        )
        for head in made[:2]
    )
    student, teacher = heads
    for tensor in student.tensors:
        if tensor is not None:
            tensor.requires_grad_()
    return Made(student, teacher, made.fields)


def differ(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() - other.detach()).norm() / other.detach().norm())


def mixed(made: Made, case: Case, plain: bool = False):
    task = Learner(case.smoothing, case.z_loss)
    output = made.student.logits() if plain else made.student
    rows = TeacherRows(
        made.teacher.logits() if plain else made.teacher, case.temperature, case.top_k
    )
    return task.mixed_sum((output,), made.fields, rows, case.alpha, case.temperature)


@pytest.mark.parametrize("plain", [False, True], ids=["head", "logits"])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_those_of_the_formula(
    case: Case, dtype: torch.dtype, plain: bool
) -> None:
    made = make(case, dtype)
    exact = widened(made)
    found, expected = mixed(made, case, plain), by_definition(exact, case)
    assert found.loss.dtype == torch.promote_types(dtype, torch.float32)
    for value, other in zip((found.loss, *found.parts), expected, strict=True):
        assert differ(value, other) < CLOSE[dtype]
    (found.loss * 0.37).backward()
    (expected[0] * 0.37).backward()
    for tensor, other in zip(made.student.tensors, exact.student.tensors, strict=True):
        if tensor is not None:
            assert tensor.grad.dtype == dtype
            assert differ(tensor.grad, other.grad) < 10 * CLOSE[dtype]


def test_without_a_share_of_the_teacher_it_is_the_tasks_loss() -> None:
    case = Case(0.0, smoothing=0.1, z_loss=1e-3, counted=True)
    made = make(case, torch.float32)
    expected = Learner(0.1, 1e-3).objective_sum((made.student,), made.fields)
    torch.testing.assert_close(mixed(made, case).loss, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_heads_that_share_the_vocabulary_have_the_same_loss(case: Case, dtype: torch.dtype) -> None:
    made = make(case, dtype)
    whole = mixed(made, case)
    whole.loss.backward()
    heads, bounds = Heads(), [0, 20, 33, V]
    found: list[tuple[Tensor, Tensor, Tensor]] = [None] * SHARDS  # type: ignore[list-item]

    def run(number: int) -> None:
        part = slice(bounds[number], bounds[number + 1])
        own = make(case, dtype)
        maximum = heads.reduce(number, lambda every: every.amax(0))
        total = heads.reduce(number, lambda every: every.sum(0))
        shard = VocabularyShard(part.start, V, 20, maximum, total, lambda logits: logits)
        bias = own.student.bias_V
        student = own.student._replace(
            weight_VC=own.student.weight_VC.detach()[part].clone().requires_grad_(),
            bias_V=None if bias is None else bias.detach()[part].clone().requires_grad_(),
            shard=shard,
        )
        loss = mixed(own._replace(student=student), case).loss
        loss.backward()
        found[number] = loss.detach(), student.hidden_BTC.grad, student.weight_VC.grad

    threads = [threading.Thread(target=run, args=(number,)) for number in range(SHARDS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    far = 10 * CLOSE[dtype]
    for loss, *_ in found:
        assert differ(loss, whole.loss) < far
    assert differ(sum(each[1] for each in found), made.student.hidden_BTC.grad) < far
    assert differ(torch.cat([each[2] for each in found]), made.student.weight_VC.grad) < far


def test_a_small_divergence_keeps_its_digits() -> None:
    torch.manual_seed(1)
    made = make(Case(), torch.float32)
    head = made.student
    near = head._replace(
        hidden_BTC=head.hidden_BTC.detach() + 1e-3 * torch.randn(B, T, C),
        weight_VC=head.weight_VC.detach(),
    )
    made = made._replace(teacher=near)
    exact = by_definition(widened(made), Case())[1:]
    for plain in (False, True):
        found = mixed(made, Case(), plain).parts
        assert float(found[1]) < 1e-4 * float(found[0])
        assert differ(found[1], exact[1]) < 3e-2


def test_memory_does_not_grow_with_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    positions, tokens = 512, 4000
    monkeypatch.setattr(head_chunks, "CPU_CHUNK_BYTES", 16 * tokens * 4)
    student = LinearHead(
        torch.randn(1, positions, 8, requires_grad=True), torch.randn(tokens, 8, requires_grad=True)
    )
    teacher = LinearHead(torch.randn(1, positions, 8), torch.randn(tokens, 8))
    fields = {"targets": torch.zeros(1, positions, dtype=torch.int64)}

    def run() -> None:
        rows = TeacherRows(teacher, 2.0)
        Learner().mixed_sum((student,), fields, rows, 0.5, 2.0).loss.backward()

    # Two chunks of logits of 16 positions, of 512, and the gradients of the head.
    assert peak_tensor_bytes(run) < positions * tokens * 4 / 8
