"""Losses of heads that share a vocabulary, against those of one head."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mpillm.models.linear_head import LinearHead, VocabularyShard
from mpillm.tasks.cross_entropy import cross_entropy_sum

WIDTH, VOCABULARY, SHARDS = 12, 37, 3


class Heads:
    """Three heads in threads of one process: values of all meet at a barrier."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(SHARDS)
        self.given: list[Tensor] = [torch.empty(0)] * SHARDS

    def reduce(self, number: int, combine: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
        def run(values: Tensor) -> None:
            self.given[number] = values.clone()
            self.barrier.wait(20)
            values.copy_(combine(torch.stack(self.given)))
            self.barrier.wait(20)

        return run


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("smoothing", "z_loss", "cap", "biased", "counted"),
    [
        (0.0, 0.0, 0.0, False, False),
        (0.1, 0.0, 0.0, False, True),
        (0.0, 1e-2, 5.0, True, False),
        (0.2, 1e-2, 5.0, True, True),
    ],
)
def test_shards_have_the_loss_and_the_gradients_of_one_head(
    dtype: torch.dtype, smoothing: float, z_loss: float, cap: float, biased: bool, counted: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 9, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(VOCABULARY, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
    counts = torch.randint(0, 3, (2, 9), generator=generator).float() if counted else None
    given = targets, counts, smoothing, z_loss
    whole = cross_entropy_sum(LinearHead(hidden, weight, bias if biased else None, cap), *given)
    whole.backward()
    heads, bounds = Heads(), [0, 13, 26, VOCABULARY]
    found: list[tuple[Tensor, ...]] = [()] * SHARDS

    def run(number: int) -> None:
        part = slice(bounds[number], bounds[number + 1])
        maximum = heads.reduce(number, lambda every: every.amax(0))
        total = heads.reduce(number, lambda every: every.sum(0))
        shard = VocabularyShard(part.start, VOCABULARY, 13, maximum, total, lambda logits: logits)
        own = [t.detach()[part].clone().requires_grad_() for t in (weight, bias)]
        states = hidden.detach().clone().requires_grad_()
        head = LinearHead(states, own[0], own[1] if biased else None, cap, shard)
        loss = cross_entropy_sum(head, *given)
        loss.backward()
        found[number] = loss.detach(), states.grad, own[0].grad, own[1].grad

    threads = [threading.Thread(target=run, args=(number,)) for number in range(SHARDS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    far = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for loss, *_ in found:
        assert float(loss) == pytest.approx(float(whole.detach()), rel=far)
    gradients = [(sum(each[1].double() for each in found), hidden.grad)]
    gradients.append((torch.cat([each[2] for each in found]), weight.grad))
    if biased:
        gradients.append((torch.cat([each[3] for each in found]), bias.grad))
    for one, other in gradients:
        assert (one - other).norm() <= far * other.norm()
