"""Train a student with and without its teacher on real text, for the same number of steps.

    python benchmarks/distillation.py [--ranks 2 --teacher-steps 500 --steps 200 --json FILE]

The text is the source of Python's standard library. The student has half of the teacher's layers.
Both see the same batches in the same order; the loss is that of the validation split in nats a
token, of the task alone. The gain is the share of the gap between the student alone and the teacher
that distillation closes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# The project's bar: of the gap between the student alone and its teacher.
LEAST_GAIN = 0.5
SHARED = {
    "model.width": "192",
    "model.heads": "6",
    "model.context": "128",
    "optimizer.learning_rate": "3e-3",
    "optimizer.warmup_steps": "20",
    "train.batch": "16",
    "train.sinks": "[]",
}
WAYS: dict[str, dict[str, str]] = {
    "alone": {},
    "logits": {"alpha": "0.9"},
    "logits at T = 2": {"alpha": "0.9", "temperature": "2"},
    "logits and layers": {
        "alpha": "0.9",
        "hidden": "cosine",
        "layers": "[[0, 1], [1, 3]]",
    },
}


def train(recipe: Path, folder: Path, ranks: int, settings: dict[str, str]) -> dict[str, float]:
    """Train; return the last validation loss, and the median seconds of a step."""
    given = {**SHARED, **settings, "train.run": str(folder)}
    words = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    place = ["mpirun", "-n", str(ranks), "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
    command = [*place, sys.executable, "-m", "mpillm", "train", str(recipe), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    seconds = sorted(line["step_seconds"] for line in lines if "step_seconds" in line)
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    return {"loss": losses[-1], "step_seconds": seconds[len(seconds) // 2]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("ranks", 2), ("teacher-steps", 500), ("steps", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layers", type=int, default=2, help="of the student, half the teacher's")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--data", type=Path, help="a prepared dataset; none: prepare it")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), given.data or Path(name) / "data"
        if given.data is None:
            words = ["prepare", "stdlib", "--out", str(data), "--vocab-size", "2048"]
            subprocess.run([sys.executable, "-m", "mpillm", *words], check=True)
        recipe = folder / "recipe.toml"
        recipe.write_text(f'[data]\npath = "{data}"\n')
        large = {"model.layers": str(2 * given.layers), "train.steps": str(given.teacher_steps)}
        figures["teacher"] = train(recipe, folder / "teacher", given.ranks, large)
        for number, way in enumerate(given.ways):
            small = {"model.layers": str(given.layers), "train.steps": str(given.steps)}
            if way != "alone":
                own = {"teacher": str(folder / "teacher"), **WAYS[way]}
                small |= {f"distillation.{key}": value for key, value in own.items()}
            figures[way] = train(recipe, folder / f"run-{number}", given.ranks, small)
    teacher, alone = figures["teacher"]["loss"], figures.get("alone", {}).get("loss")
    print(
        f"teacher of {2 * given.layers} layers, {given.teacher_steps} steps; students of "
        f"{given.layers} layers, {given.steps} steps; {given.ranks} ranks"
    )
    print(f"{'':>20}{'loss':>9}{'of the gap':>12}{'step (s)':>10}")
    for way, each in figures.items():
        each["gain"] = (alone - each["loss"]) / (alone - teacher) if alone else float("nan")
        print(f"{way:>20}{each['loss']:>9.4f}{each['gain']:>12.0%}{each['step_seconds']:>10.3f}")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
    taught = [figures[way]["gain"] for way in given.ways if way != "alone"]
    if alone and taught:
        print(f"at least {LEAST_GAIN:.0%} of the gap: {max(taught) >= LEAST_GAIN}")
        sys.exit(max(taught) < LEAST_GAIN)


if __name__ == "__main__":
    main()
