"""SmolLM2-135M-Instruct, a published model: imported, it is what others read in its file."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpillm.infer.generate import sample_tokens
from mpillm.infer.import_model import import_model
from mpillm.infer.loading import Loaded, load_trained
from mpillm.infer.sampling import Sampling
from mpillm.system.console import Console
from tests.pretrained import peer, smollm2

pytestmark = pytest.mark.slow("reads 135 million weights, three times")
QUIET = Console(speaks=False)
PROMPTS = ("The capital of France is", "def fibonacci(n):")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "smollm2"
    import_model(smollm2(), out, MPI.COMM_SELF, QUIET)
    return out


@pytest.fixture(scope="module")
def ours(imported: Path) -> Loaded:
    return load_trained(imported, MPI.COMM_SELF, QUIET)


@pytest.fixture(scope="module")
def theirs() -> Any:
    path = smollm2()
    model = peer("transformers").AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


def greedy(loaded: Loaded, prompt: str, count: int) -> list[int]:
    ids = loaded.tokenizer.encode(prompt)
    return list(sample_tokens(loaded.model, ids, Sampling(max_tokens=count, temperature=0)))


def greedy_of_peer(model: Any, ids: list[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=count, min_new_tokens=count
    )
    return list(out[0, len(ids) :].tolist())


def test_it_computes_what_transformers_computes(ours: Loaded, theirs: Any) -> None:
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    ids = torch.tensor([ours.tokenizer.encode(text)[:257]])
    with torch.inference_mode():
        logits, expected = ours.model(ids[:, :-1]), theirs(ids[:, :-1]).logits
    losses = [
        torch.nn.functional.cross_entropy(each[0], ids[0, 1:]).item() for each in (logits, expected)
    ]
    assert abs(losses[0] - losses[1]) < 1e-4
    assert 0.5 < losses[1] < 3
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_its_greedy_tokens_are_those_of_transformers(
    ours: Loaded, theirs: Any, prompt: str
) -> None:
    ids = ours.tokenizer.encode(prompt)
    assert greedy(ours, prompt, 12) == greedy_of_peer(theirs, ids, 12)
