"""SmolLM2-135M-Instruct, a published model, and what transformers and llama.cpp read of it.

The figures on more text are those of benchmarks/pretrained.py; this is a sample of it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.infer.export_model import export_model
from mpillm.infer.import_model import import_model
from mpillm.system.console import Console
from tests.pretrained import peer, smollm2

pytestmark = pytest.mark.slow("135 million weights are imported, exported and read by others")
QUIET = Console(speaks=False)
PROMPTS = ("The capital of France is", "def fibonacci(n):")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "smollm2"
    import_model(smollm2(), out, MPI.COMM_SELF, QUIET)
    return out


@pytest.fixture(scope="module")
def ours(imported: Path) -> Any:
    smollm2()
    from readers.in_torch import Ours

    return Ours(imported)


@pytest.fixture(scope="module")
def window(ours: Any) -> list[int]:
    """Tokens of a text that the model has not seen as it is here."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    return list(ours.tokenizer.encode(text)[:201])


@pytest.fixture(scope="module")
def quantised(imported: Path) -> Iterator[Any]:
    """The export in Q8_0 in llama.cpp."""
    peer("xllamacpp")
    from readers.llama_cpp import LlamaCpp

    out = imported.with_suffix(".gguf")
    export_model(imported, out, "gguf", "q8_0", MPI.COMM_SELF, QUIET)
    with LlamaCpp(out, context=256) as server:
        yield server


def test_it_computes_what_transformers_computes(ours: Any, window: list[int]) -> None:
    """By the loss of each token, and the greedy tokens after two prompts."""
    peer("transformers")
    from readers.in_torch import Transformers

    theirs = Transformers(smollm2())
    losses, expected = ours.losses(window), theirs.losses(window)
    assert 1 < sum(expected) / len(expected) < 3
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-3
    assert abs(sum(losses) - sum(expected)) / len(losses) < 1e-5
    for prompt in PROMPTS:
        ids = ours.tokenizer.encode(prompt)
        assert ours.greedy(ids, 12) == theirs.greedy(ids, 12)


def test_its_export_in_q8_0_computes_nearly_the_same_in_llama_cpp(
    ours: Any, window: list[int], quantised: Any
) -> None:
    losses, found = ours.losses(window), quantised.losses(window)
    # A token differs by 0.1 and more, so the mean of 200 by some 0.02.
    assert abs(sum(losses) - sum(found)) / len(losses) < 0.03
    ids = ours.tokenizer.encode(PROMPTS[0])
    assert quantised.greedy(ids, 8) == ours.greedy(ids, 8)


@pytest.mark.parametrize(
    "text", ["It's 2026: 12 users\n\n  print('é')\tand  more. 日本語 🦊", "<|im_end|> is a text"]
)
def test_its_tokens_are_those_of_llama_cpp(ours: Any, quantised: Any, text: str) -> None:
    ids = ours.tokenizer.encode(text)
    assert quantised.encode(text) == ids
    assert ours.tokenizer.decode(ids) == text
