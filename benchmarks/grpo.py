"""Tune a small decoder on made-up sums until some are right, then let GRPO raise the reward.

    python benchmarks/grpo.py [--ranks 2 --steps 2000 --digits 2 --set task.kl=0 --json FILE]

The decoder is new. It first learns sums with their answers (`chat`), in parts of `--tuned` steps,
until 30% of the held-out sums are right. Then it learns from the reward of its own answers alone:
1 for a right sum, else 0. Both shares are of greedy answers to sums that no run has read.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models

# The project's bar: by so much the share of right sums rises, within so many seconds.
LEAST_GAIN, MOST_SECONDS = 0.3, 600
# GRPO begins where so many of the held-out sums are right.
LEAST_RIGHT, MOST_RIGHT = 0.3, 0.5
HELD_OUT = 500
# The tuning keeps a checkpoint every so many steps.
SAVED = 10
END = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}"
    "{{ '=' if m['role'] == 'user' else '" + END + "' }}{% endfor %}"
)
MODEL = {"layers": 3, "width": 128, "heads": 4, "hidden": 256, "context": 12}
TUNED = {
    "data": {"pack": False},
    "task": {"name": "chat"},
    "optimizer": {
        "name": "muon",
        "learning_rate": 3e-3,
        # A constant rate, so that a part continues the one before.
        "final_share": 1.0,
        "warmup_steps": 20,
    },
    "train": {"batch": 256, "keep": 1000},
}
REWARDED = {
    "task": {"name": "grpo", "group": 8, "answer_tokens": 4, "rewards": ["exact"], "kl": 0.02},
    "optimizer": {"learning_rate": 4e-4, "warmup_steps": 5},
    "train": {"batch": 256},
}


def write_sums(folder: Path, digits: int) -> None:
    """Write a tokenizer of characters, its chat template, and the sums, some of them held out."""
    characters = {each: number for number, each in enumerate("0123456789+=")}
    tokenizer = Tokenizer(models.BPE(characters, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    draw, most = random.Random(3), 10**digits
    pairs = {(draw.randrange(most), draw.randrange(most)) for _ in range(20_000)}
    lines = [json.dumps({"prompt": f"{a}+{b}", "completion": str(a + b)}) for a, b in sorted(pairs)]
    draw.shuffle(lines)
    (folder / "sums.jsonl").write_text("".join(f"{line}\n" for line in lines))


def run(words: list[str]) -> str:
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


class Runs:
    """The commands of the benchmark, each on `ranks` ranks."""

    def __init__(self, folder: Path, ranks: int, more: list[str]) -> None:
        self.folder, self._more = folder, more
        self._mpillm = [sys.executable, "-m", "mpillm"]
        self._mpirun = ["mpirun", "-n", str(ranks), "--bind-to", "none", *self._mpillm]

    def prepare(self) -> None:
        words = ["prepare", str(self.folder / "sums.jsonl"), "--task", "chat", "--validation"]
        lines = (self.folder / "sums.jsonl").read_text().count("\n")
        words += [str(HELD_OUT / lines), "--out", str(self.folder / "data")]
        run([*self._mpillm, *words, "--tokenizer", str(self.folder)])

    def train(self, name: str, table: dict[str, dict[str, object]], *options: str) -> float:
        """Train the run `name`; return the seconds that it took, start and evaluations included."""
        data = {"path": str(self.folder / "data"), **table.get("data", {})}
        sections = {**table, "data": data}
        sections["train"] = {"run": str(self.folder / name), "sinks": [], **table["train"]}
        recipe = self.folder / f"{name}.toml"
        recipe.write_text(
            "\n".join(
                f"[{section}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in keys.items())
                for section, keys in sections.items()
            )
        )
        begun = time.perf_counter()
        run([*self._mpirun, "train", str(recipe), *options])
        return time.perf_counter() - begun

    def right(self, place: Path) -> float:
        """Return the share of held-out sums that a run or a checkpoint answers rightly."""
        words = ["evaluate", str(place), "--generate", "--max-tokens", "4"]
        words += ["--temperature", "0", "--metrics", "exact-match", "--json"]
        return float(json.loads(run([*self._mpirun, *words]))["model"]["exact_match"])

    def tune(self, part: int) -> tuple[Path, float]:
        """Tune until enough sums are right; return the checkpoint, and the share.

        Where a part passes the range, the checkpoints within it are scored.
        """
        share, steps = 0.0, 0
        while share < LEAST_RIGHT:
            steps += part
            train = {**TUNED["train"], "steps": steps, "save_every": SAVED}
            options = ["--resume"] if steps > part else []
            self.train("tuned", {"model": MODEL, **TUNED, "train": train}, *options)
            place = self.checkpoint(steps)
            share = self.scored(place)
        for step in range(steps - SAVED, steps - part, -SAVED):
            if share <= MOST_RIGHT:
                break
            place = self.checkpoint(step)
            share = self.scored(place)
        return place, share

    def scored(self, place: Path) -> float:
        share = self.right(place)
        print(f"{place.name} of the tuning: {share:.3f} of the held-out sums are right", flush=True)
        return share

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"tuned/checkpoints/step-{step:08}"

    def reward(self, steps: int, start: Path) -> tuple[float, list[dict[str, float]]]:
        """Train by rewards; return the seconds, and the lines of metrics.jsonl."""
        train = {**REWARDED["train"], "steps": steps, "evaluate_every": max(1, steps // 6)}
        train["start_from"] = str(start)
        more = [word for each in self._more for word in ("--set", each)]
        seconds = self.train("rewarded", {**REWARDED, "train": train}, *more)
        text = (self.folder / "rewarded/metrics.jsonl").read_text()
        return seconds, list(map(json.loads, text.splitlines()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000, help="of GRPO")
    parser.add_argument("--tuned", type=int, default=40, help="steps of a part of the tuning")
    parser.add_argument("--digits", type=int, default=2, help="of each number of a sum, at most")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of GRPO")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), given.ranks, given.set)
        write_sums(runs.folder, given.digits)
        runs.prepare()
        start, before = runs.tune(given.tuned)
        seconds, lines = runs.reward(given.steps, start)
        after = runs.right(runs.folder / "rewarded")
    print(f"{given.steps} steps of GRPO on {given.ranks} ranks: {seconds:.0f} s")
    print(f"{'step':>6}{'reward':>9}{'held out':>10}{'KL':>9}{'tokens':>9}{'alike':>8}")
    for line in (each for each in lines if "validation_reward" in each):
        own = next(each for each in lines if each["step"] == line["step"] and "reward" in each)
        print(
            f"{line['step']:>6}{own['reward']:>9.3f}{line['validation_reward']:>10.3f}"
            f"{own.get('kl', 0):>9.4f}{own['answer_tokens']:>9.2f}{own['alike_groups']:>8.2f}"
        )
    print(
        f"right sums: {before:.3f} at {start.name} of the tuning, {after:.3f} after GRPO "
        f"({after - before:+.3f}, bar: +{LEAST_GAIN})"
    )
    if given.json:
        found = {"start": start.name, "before": before, "after": after, "seconds": seconds}
        given.json.write_text(json.dumps({**found, "metrics": lines}) + "\n")
    fair = LEAST_RIGHT <= before <= MOST_RIGHT
    if not fair:
        print(f"{before:.3f} is not from {LEAST_RIGHT} to {MOST_RIGHT}: take another --tuned")
    if after - before < LEAST_GAIN or seconds > MOST_SECONDS or not fair:
        sys.exit(1)


if __name__ == "__main__":
    main()
