"""Ranks that share a model's stages and layers give the tokens of one rank."""

import pytest
from mpi4py import MPI

from mpillm.errors import LayoutError
from mpillm.infer.generate import sample_tokens
from mpillm.infer.serve.engine.batch_engine import BatchEngine
from mpillm.infer.serve.engine.page_pool import PagePool
from mpillm.infer.serve.engine.scheduler import SchedulerSettings
from mpillm.infer.serve.engine.spread_runner import SpreadRunner
from mpillm.models.decoder import DecoderConfig
from mpillm.models.part_module import create
from tests.infer.serve.engine.test_batch_engine import (
    CONFIG,
    GREEDY,
    ask,
    prompts,
    replaced,
)

KINDS = {
    "llama": CONFIG,
    "gpt2": CONFIG.replace(positions="learned", norm="layernorm", bias=True, kv_heads=0),
    "gemma": CONFIG.replace(window=6, full_every=2, attention_soft_cap=5.0, logits_soft_cap=9.0),
}
LAYOUTS = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 3: [(3, 1)], 4: [(1, 4), (2, 2), (4, 1)]}


def model_of(kind: str, comm: MPI.Intracomm) -> DecoderConfig:
    made = KINDS[kind].replace(layers=max(2, comm.size))
    assert isinstance(made, DecoderConfig)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_every_layout(kind: str, comm: MPI.Intracomm) -> None:
    spec = model_of(kind, comm)
    model = create(spec, 7).eval()
    read = dict(model.named_weights()).__getitem__
    asked = prompts(6, longest=20)
    for sizes in LAYOUTS[comm.size]:
        runner = SpreadRunner(spec, read, comm, sizes, 80, 4)
        if comm.rank:
            runner.follow()
            continue
        bounds = SchedulerSettings(step_tokens=24, chunk_tokens=5)
        engine = BatchEngine(runner, PagePool(80, 4), 96, 60, settings=bounds)
        heard = [ask(engine, prompt, replaced(n)) for n, prompt in enumerate(asked)]
        logs = ask(engine, asked[3], GREEDY, top_logprobs=2, prompt_logprobs=True).wait()
        [embedding] = engine.embed([tuple(asked[4])])
        found = [each.wait().tokens for each in heard]
        engine.close()
        assert found == [
            list(sample_tokens(model, prompt, replaced(n))) for n, prompt in enumerate(asked)
        ], sizes
        assert len(logs.events[0].logprobs) == len(asked[3])
        assert sum(each * each for each in embedding) == pytest.approx(1)


def test_a_layout_that_cannot_be_is_refused(comm: MPI.Intracomm) -> None:
    with pytest.raises(LayoutError, match="rank"):
        SpreadRunner(CONFIG, lambda name: None, comm, (1, comm.size + 1), 8, 4)  # type: ignore[arg-type, return-value]
