"""Learn a translation from scratch, with the commands a user would type, next to a plain loop.

    python benchmarks/translation.py --data FOLDER [--steps 3000 --ranks 2 --only mpillm]

FOLDER holds Multi30k (Elliott et al. 2016): train.en, train.de, test_2016_flickr.en and .de. An
encoder-decoder of Marian's kind learns the 29,000 pairs, from English to German. The plain loop
trains the same architecture as transformers has it, on the same tokens, with as many updates of the
same size. Both write the test set by beams; sacrebleu scores them.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MPILLM = [sys.executable, "-m", "mpillm"]
PLACE = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
BATCH, RATE, WARMUP, SMOOTHING, CLIP, DECAY = 128, 1e-3, 400, 0.1, 1.0, 0.01
BEAMS, MOST_TOKENS = 4, 60
MODEL: dict[str, Any] = {
    "architecture": "encoder-decoder",
    "layers": 3,
    "width": 256,
    "heads": 4,
    "hidden": 1024,
    "context": 64,
    "source_context": 64,
    "dropout": 0.2,
    "norm": "layernorm",
    "norm_place": "post",
    "positions": "sinusoidal",
    "activation": "relu",
    "bias": True,
    "scaled_embedding": True,
    "head_bias": True,
}
# The project's bars, in points of BLEU.
LEAST_BLEU, FARTHEST = 25.0, 1.0


def mpillm(*arguments: object, ranks: int = 1) -> str:
    before = ["mpirun", "-n", str(ranks), *PLACE] if ranks > 1 else []
    words = [*before, *MPILLM, *map(str, arguments)]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout


def prepare(folder: Path, data: Path) -> None:
    """Prepare the pairs that train, and those of the test set with the same tokenizer."""
    train = [data / f"train.{language}" for language in ("en", "de")]
    made = ["--validation", "0.01", "--vocab-size", "8000"]
    mpillm("prepare", *train, "--task", "seq2seq", "--out", folder / "train", *made)
    test = [data / f"test_2016_flickr.{language}" for language in ("en", "de")]
    # A split has one pair at least: nearly all are for validation.
    made = ["--validation", "0.999", "--tokenizer", str(folder / "train")]
    mpillm("prepare", *test, "--task", "seq2seq", "--out", folder / "test", *made)


def train(folder: Path, options: argparse.Namespace) -> Path:
    run, recipe = folder / "run", folder / "recipe.toml"
    model = "".join(f"{key} = {json.dumps(value)}\n" for key, value in MODEL.items())
    recipe.write_text(
        f'[train]\nrun = "{run}"\nsteps = {options.steps}\nbatch = {BATCH}\nsave_every = 0\n'
        f'evaluate_every = 0\nsinks = []\ndtype = "{options.dtype}"\n[model]\n{model}'
        f'[task]\nname = "seq2seq"\nlabel_smoothing = {SMOOTHING}\n'
        f"[optimizer]\nlearning_rate = {RATE}\nwarmup_steps = {WARMUP}\n"
        f"weight_decay = {DECAY}\nclip = {CLIP}\n"
        f'[data]\npath = "{folder / "train"}"\n'
    )
    mpillm("train", recipe, ranks=options.ranks)
    return run


def score(run: Path, folder: Path, ranks: int) -> dict[str, Any]:
    words = ["--generate", "--beams", BEAMS, "--max-tokens", MOST_TOKENS, "--metrics", "bleu,chrf"]
    given = ["evaluate", run, "--data", folder / "test", *words, "--json"]
    found: dict[str, Any] = json.loads(mpillm(*given, ranks=ranks))["model"]
    return found


class Pairs:
    """The tokens of a dataset, as arrays for the plain loop."""

    def __init__(self, folder: Path, split: str, context: int) -> None:
        from mpillm.tokens.pairs.pair_manifest import PairManifest
        from mpillm.tokens.pairs.pair_reader import PairReader

        manifest = PairManifest.load(folder)
        assert isinstance(manifest, PairManifest)
        with PairReader(manifest, split) as reader:
            every = [reader.sides(number) for number in range(reader.n_pairs)]
        self.pairs = [(source[:context], target[:context]) for source, target in every]

    def __len__(self) -> int:
        return len(self.pairs)

    def sides(self, numbers: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return sources padded by 0, their mask, and targets padded by -100."""
        some = [self.pairs[int(number)] for number in numbers]
        longest = [max(len(pair[side]) for pair in some) for side in (0, 1)]
        sources, mask = (np.zeros((len(some), longest[0]), np.int64) for _ in range(2))
        targets = np.full((len(some), longest[1]), -100, np.int64)
        for row, (source, target) in enumerate(some):
            sources[row, : len(source)], mask[row, : len(source)] = source, 1
            targets[row, : len(target)] = target
        return torch.from_numpy(sources), torch.from_numpy(mask), torch.from_numpy(targets)


def rate_of(step: int, steps: int) -> float:
    """Return the share of the largest rate: linear up, then a cosine down to a tenth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    share = (step - WARMUP) / max(1, steps - WARMUP)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def plain_loop(folder: Path, config: Any, options: argparse.Namespace) -> Any:
    """Train transformers' model of `config`; return it."""
    from transformers import MarianMTModel

    torch.manual_seed(0)
    torch.set_num_threads(options.ranks)
    model = MarianMTModel(config)
    decayed = [each for each in model.parameters() if each.dim() > 1]
    others = [each for each in model.parameters() if each.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: rate_of(n, options.steps))
    pairs = Pairs(folder / "train", "train", MODEL["context"])
    model.train()
    lower = torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16")
    for numbers in batches(len(pairs), options.steps):
        sources, mask, targets = pairs.sides(numbers)
        begun = targets.roll(1, 1)
        begun[:, 0] = config.decoder_start_token_id
        begun[begun < 0] = config.pad_token_id
        given = {"input_ids": sources, "attention_mask": mask, "decoder_input_ids": begun}
        with lower:
            logits = model(**given).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), label_smoothing=SMOOTHING
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
    return model.eval()  # type: ignore[no-untyped-call]


def batches(count: int, steps: int) -> Iterator[Any]:
    chance, order = np.random.default_rng(0), np.zeros(0, np.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = np.concatenate((order, chance.permutation(count)))
        yield order[:BATCH]
        order = order[BATCH:]


def plain_bleu(model: Any, folder: Path) -> float:
    """Write the test set by beams; return the BLEU."""
    import sacrebleu

    from mpillm.tokens.manifest import Manifest

    tokenizer = Manifest.load(folder / "test").load_tokenizer()
    pairs, written, known = Pairs(folder / "test", "validation", MODEL["context"]), [], []
    for first in range(0, len(pairs), BATCH):
        numbers = range(first, min(first + BATCH, len(pairs)))
        sources, mask, _ = pairs.sides(numbers)
        with torch.inference_mode():
            given = {"num_beams": BEAMS, "max_new_tokens": MOST_TOKENS, "do_sample": False}
            ids = model.generate(input_ids=sources, attention_mask=mask, **given)
        for row, number in zip(ids.tolist(), numbers, strict=True):
            ended = row[1:]
            end = model.config.eos_token_id
            ended = ended[: ended.index(end)] if end in ended else ended
            written.append(tokenizer.decode(ended).strip())
            known.append(tokenizer.decode(pairs.pairs[number][1].tolist()[:-1]).strip())
    return float(sacrebleu.corpus_bleu(written, [known]).score)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of Multi30k")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--only", choices=("mpillm",))
    return parser.parse_args()


def processor_minutes() -> float:
    spent = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in spent) / 60


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.data)
        before, begun = processor_minutes(), time.perf_counter()
        run = train(folder, options)
        minutes, seconds = processor_minutes() - before, time.perf_counter() - begun
        found = score(run, folder, options.ranks)
        ours = found["bleu"]
        print(
            f"mpillm: {ours:.2f} BLEU, {found['chrf']:.2f} chrF after {options.steps:,} steps of "
            f"{BATCH}, {minutes:.0f} minutes of processor time, {seconds:.0f} s",
            flush=True,
        )
        holds = ours >= LEAST_BLEU
        if options.only is None:
            from transformers import AutoConfig

            mpillm("export", run, "--out", folder / "hf")
            config = AutoConfig.from_pretrained(folder / "hf")
            theirs = plain_bleu(plain_loop(folder, config, options), folder)
            print(f"plain loop of transformers: {theirs:.2f} BLEU", flush=True)
            holds = holds and ours >= theirs - FARTHEST
    print("the bars are met" if holds else "a bar is missed")
    sys.exit(not holds)


if __name__ == "__main__":
    main()
