"""An encoder-decoder over real pipelines: one stream in its encoder, two in its decoder."""

import pytest
import torch

from mpillm.comm.mesh import Mesh
from mpillm.models.encoder_decoder import SHAPES
from mpillm.models.part_module import create
from mpillm.parallel.pipeline.stage import Batch
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.parallel.step_plan import plan_step
from mpillm.tasks.causal_lm import CausalLM
from mpillm.tasks.cross_entropy import cross_entropy_sum
from tests.parallel.score_totals import totals

ROWS, SOURCE, LENGTH, MELS, VOCABULARY = 12, 9, 6, 5, 40
SMALL = {
    "layers": 4,
    "decoder_layers": 5,
    "width": 16,
    "heads": 2,
    "head_width": 8,
    "hidden": 24,
    "context": LENGTH,
    "source_context": SOURCE,
    "vocab_size": VOCABULARY,
}
T5 = SHAPES["t5-small"].replace(**SMALL)
WHISPER = SHAPES["whisper-tiny"].replace(**SMALL, mels=MELS)


class Translation(CausalLM):
    """Pairs: the decoder's tokens are learnt, given the source."""

    field_names = ("source", "source_lengths", "ids", "targets")


def fields(config):
    generator = torch.Generator().manual_seed(9)
    source = {
        "source": torch.randint(VOCABULARY, (ROWS, SOURCE), generator=generator),
        "frames": torch.randn(ROWS, 2 * SOURCE, MELS, generator=generator),
    }[config.source_field]
    return {
        config.source_field: source,
        "source_lengths": torch.randint(1, SOURCE + 1, (ROWS,), generator=generator),
        "ids": torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator),
        "targets": torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator),
    }


def sharded(comm, config, settings, data=1, **plan_settings):
    """The model over all ranks, and its share of the batch."""
    mesh = Mesh(comm, {"data": data, "pipeline": comm.size // data})
    plan = plan_step(config, settings, data, ROWS, 1, **plan_settings)
    model = ShardedModel(config, Translation(), 1, mesh, plan, settings, scored_rows=3)
    first = mesh.axis("data").rank * plan.rows
    own = {name: field[first : first + plan.rows] for name, field in fields(config).items()}
    pieces = [{name: field[a:b] for name, field in own.items()} for a, b in plan.bounds]
    return model, Batch(pieces, ROWS * LENGTH)


def check(comm, config, settings, data=1, steps=2, **plan_settings):
    """Compare losses and gradients of steps with one process that has the whole model."""
    whole, given = create(config, 1), fields(config)
    loss = cross_entropy_sum(whole(given), given["targets"]) / (ROWS * LENGTH)
    loss.backward()
    gradients = {name: weight.grad for name, weight in whole.named_weights()}
    norm = float(torch.nn.utils.clip_grad_norm_(whole.parameters(), 1e9))
    model, batch = sharded(comm, config, settings, data, **plan_settings)
    for _ in range(steps):  # the second step finds what the first left
        found = sum(comm.allgather(sum(model.train(batch).losses)))
        assert found == pytest.approx(float(loss.detach()), rel=1e-5)
        for part, weight in model.named_weights().items():
            torch.testing.assert_close(weight.grad, gradients[part], rtol=1e-4, atol=1e-6, msg=part)
        assert model.clip_(0) == pytest.approx(norm, rel=1e-5)
    assert set().union(*comm.allgather(set(model.named_weights()))) == set(gradients)
    model.close()


@pytest.mark.parametrize(("name", "config"), [("interleaved", T5), ("zb-v", T5), ("zb-v", WHISPER)])
def test_gradients_are_the_whole_model_s(comm, name, config):
    check(comm, config, ParallelSettings(pipeline=comm.size, schedule=name))


# In the encoder, between both stacks, in the decoder; of three and four stages too.
CUTS = {
    1: [(9,)],
    2: [(2, 7), (4, 5), (6, 3)],
    3: [(2, 2, 5), (1, 4, 4), (4, 1, 4)],
    4: [(2, 2, 2, 3), (1, 1, 5, 2), (5, 1, 1, 2)],
}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_any_cut_gives_the_whole_model_s_gradients(comm, place):
    cuts = CUTS.get(comm.size, [])
    if place >= len(cuts):
        pytest.skip("there is no such cut")
    for name, recompute in (("1f1b", "full"), ("zb-h1", "none")):
        settings = ParallelSettings(pipeline=comm.size, schedule=name, stages=cuts[place])
        check(comm, T5, settings, steps=1, recompute=recompute)


def test_pipelines_side_by_side(comm):
    if comm.size % 2:
        pytest.skip("needs an even number of ranks")
    check(comm, T5, ParallelSettings(pipeline=comm.size // 2, schedule="interleaved"), data=2)


def test_scores_are_the_whole_model_s(comm):
    model, _ = sharded(comm, T5, ParallelSettings(pipeline=comm.size, schedule="zb-v"))
    whole, given = create(T5, 1), fields(T5)
    rows = [slice(0, 3), slice(3, 6), slice(6, 8)]
    batches = [{name: field[piece] for name, field in given.items()} for piece in rows]
    # A batch of shorter rows of the decoder.
    batches[2] = {**batches[2], **{k: batches[2][k][:, :4] for k in ("ids", "targets")}}
    found = model.score(
        3, batches.__getitem__, lambda n: tuple(batches[n]["ids"].shape), lambda: None
    )
    merged = {
        number: totals(score)[0] for part in comm.allgather(found) for number, score in part.items()
    }
    with torch.inference_mode():
        expected = {
            n: float(cross_entropy_sum(whole(batch), batch["targets"]))
            for n, batch in enumerate(batches)
        }
    assert merged == pytest.approx(expected, rel=1e-6)
    model.close()
