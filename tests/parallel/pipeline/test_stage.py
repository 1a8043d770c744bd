"""Stages: which outputs a task and its metrics get, and which loss counts."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mpillm.models.decoder import DecoderConfig
from mpillm.models.linear_head import LinearHead
from mpillm.models.part_module import create
from mpillm.parallel.pipeline.stage import Batch, ModelStage, ScoringStage
from mpillm.parallel.precision import lower_
from mpillm.parallel.step_plan import Precision
from mpillm.tasks.causal_lm import CausalLM
from mpillm.tasks.task import Task

SPEC = DecoderConfig(layers=1, width=16, heads=2, context=8, vocab_size=30)
FIELDS = CausalLM().fields({"tokens": np.arange(18).reshape(2, 9) % 30})


class Watched(CausalLM):
    """A task that notes what it gets, and has another objective than loss."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[type] = []

    def loss_sum(self, outputs, fields) -> Tensor:
        self.seen.append(type(outputs[0]))
        return super().loss_sum(outputs, fields)

    def objective_sum(self, outputs, fields) -> Tensor:
        return 3 * self.loss_sum(outputs, fields)


class Plain(Watched):
    """A task that reads tensors alone, as a plug-in does."""

    reads_heads = False


class NoSync:
    """Gradients that stay where they are."""

    gathered = None

    def last_microbatch(self, number: int) -> None: ...
    def microbatch_ended(self, number: int) -> None: ...


@pytest.fixture(params=["float32", "bfloat16"])
def precision(request: pytest.FixtureRequest) -> Precision:
    return Precision(dtype=request.param)


@pytest.mark.parametrize(("kind", "output"), [(Watched, LinearHead), (Plain, Tensor)])
def test_a_task_reads_heads_only_where_it_says_so(
    kind: type[Watched], output: type, precision: Precision
) -> None:
    found = {}
    for task in (kind(), Plain()):
        part = create(SPEC, 1)
        lower_(part.parameters(), precision)
        stage = ModelStage(part, 0, NoSync(), task)  # type: ignore[arg-type]
        stage.batch = Batch([FIELDS], 16.0)
        assert stage.forward(0, ()) == ()
        stage.backward(0, ())
        found[task] = float(stage.losses[0]), dict(part.named_weights())
    (watched, (loss, weights)), (_, (expected, others)) = found.items()
    assert watched.seen == [output]
    # bfloat16 rounds the weight's gradient of the head otherwise.
    close = {"rtol": 1e-4, "atol": 1e-6} if precision.dtype == "float32" else {"rtol": 0.1}
    assert loss == pytest.approx(expected, rel=1e-5 if precision.dtype == "float32" else 1e-3)
    assert loss == pytest.approx(3 * np.log(30), rel=0.1)
    for name, weight in weights.items():
        torch.testing.assert_close(
            weight.grad.norm(), others[name].grad.norm(), **{"atol": 1e-2, **close}, msg=name
        )


@pytest.mark.parametrize(("kind", "output"), [(Watched, LinearHead), (Plain, Tensor)])
def test_scoring_takes_the_loss_and_metrics_the_logits(
    kind: type[Task], output: type, precision: Precision
) -> None:
    shapes = []

    def of_rows(outputs, fields) -> np.ndarray:
        shapes.append((type(outputs[0]), outputs[0].shape, fields["targets"].shape))
        return np.array([[0.0, 1.0], [0.0, 3.0]])

    losses = []
    for metrics, seen in (((), output), ((of_rows,), Tensor)):
        task, read = kind(), lambda number: FIELDS
        part = create(SPEC, 1)
        lower_(part.parameters(), precision)
        stage = ScoringStage(part, task, precision, read, lambda: None, metrics)
        stage.forward(0, ())
        assert task.seen == [seen, seen]  # a row each
        rows = stage.scores[0].rows
        losses.append(rows.values_BU[:, 0].sum())
    assert stage.scores[0].widths == (2,)
    # The loss, the weight, and the statistics; a column of zeros takes no memory.
    assert (rows.width, rows.columns_U.tolist()) == (4, [0, 1, 3])
    assert rows.values_BU[:, 1:].tolist() == [[8, 1], [8, 3]]
    assert shapes == [(np.ndarray, (2, 8, 30), (2, 8))]
    exact = precision.dtype == "float32"
    assert losses[0] == pytest.approx(losses[1], rel=1e-6 if exact else 1e-3)
    assert losses[0] == pytest.approx(16 * np.log(30), rel=0.1)
