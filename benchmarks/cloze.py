"""Train a masked LM on real text, and compare its accuracy with that of counting.

    python benchmarks/cloze.py [--ranks 2 --steps 4000 --set model.width=192 --json FILE]

The text is the source of Python's standard library. A hidden token of the validation split is
guessed by the model, by the most frequent token, and from both neighbours (infer/cloze_baselines).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# The project's bar: points of accuracy above the better guess.
LEAST_GAIN = 0.10
SETTINGS = {
    "model.shape": "modernbert-tiny",
    "model.width": "128",
    "model.hidden": "256",
    "model.context": "128",
    "task.name": "masked-lm",
    # More targets a step than BERT's 0.15 (Wettig et al. 2022, "Should you mask 15%?").
    "task.masked_share": "0.3",
    "optimizer.name": "muon",
    "optimizer.learning_rate": "1e-2",
    "optimizer.warmup_steps": "50",
    "train.batch": "16",
    "train.evaluate_every": "0",
    "train.save_every": "0",
}


def run(words: list[str]) -> str:
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    mpillm = [sys.executable, "-m", "mpillm"]
    with tempfile.TemporaryDirectory() as folder:
        data, made = f"{folder}/data", f"{folder}/run"
        run([*mpillm, "prepare", "stdlib", "--out", data, "--vocab-size", str(given.vocab_size)])
        recipe = Path(folder) / "recipe.toml"
        recipe.write_text(f'[data]\npath = "{data}"\n')
        settings = {**SETTINGS, "train.steps": str(given.steps), "train.run": made}
        settings |= dict(each.split("=", 1) for each in given.set)
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        begun = time.perf_counter()
        run(
            [
                "mpirun",
                "-n",
                str(given.ranks),
                "--bind-to",
                "none",
                *mpillm,
                "train",
                str(recipe),
                *words,
            ]
        )
        seconds = time.perf_counter() - begun
        cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
        metrics = ["--metrics", "loss,accuracy", "--baselines", "--json"]
        found = json.loads(run([*mpillm, "evaluate", made, *metrics]))
    print(f"{given.steps} steps on {given.ranks} ranks: {seconds:.0f} s")
    print(f"processor time of all, preparing included: {cpu.ru_utime + cpu.ru_stime:.0f} s")
    print(f"{'':>12}{'accuracy':>10}{'loss':>10}")
    for name in ("model", "bigram", "unigram"):
        print(f"{name:>12}{found[name]['accuracy']:>10.4f}{found[name]['loss']:>10.4f}")
    gain = found["model"]["accuracy"] - max(found[n]["accuracy"] for n in ("bigram", "unigram"))
    print(f"gain over the better guess: {100 * gain:.1f} points (bar: {100 * LEAST_GAIN:.0f})")
    if given.json:
        given.json.write_text(json.dumps({"seconds": seconds, **found}) + "\n")
    if gain < LEAST_GAIN:
        sys.exit(1)


if __name__ == "__main__":
    main()
