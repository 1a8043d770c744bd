"""Compare packed conversations with padded ones: the time of their losses and gradients.

    python benchmarks/packing.py [--data prepared/chats --context 1024 --json FILE]

The same conversations, of the lengths of a dataset or of made-up ones, pass once forward and
backward through a small decoder: packed into rows, each in a row that is padded to the longest of
its batch, and each in a row of the context. They take turns within each round; ratios are taken
within a round. On a CPU the time is CPU time of one thread.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from cross_entropy import seconds_of

from mpillm.bench.timing import in_turn
from mpillm.models.model_catalog import read_spec
from mpillm.models.part_module import PartModule
from mpillm.system.malloc import keep_pages
from mpillm.tasks.task_catalog import make_task
from mpillm.tokens.pairs.packing import pack_rows
from mpillm.tokens.pairs.pair_manifest import PairManifest
from mpillm.tokens.pairs.pair_reader import PairReader

# What the project asks for, and the widest that rounding may make the losses differ.
LEAST_SPEEDUP, MOST_DIFFERENCE = 2.0, 1e-5
# Of alpaca's demo with SmolLM2's tokens: a mean of 199, of which 75% are learnt.
MEDIAN, SPREAD, LEARNT = 164, 0.62, 0.75
WAYS = ("padded to the context", "padded to the longest", "packed")
Rows = list[list[int]]


class Contestant:
    """One way to put conversations into rows: batches of fields, about equally many tokens each."""

    def __init__(self, model: PartModule, lengths: np.ndarray, way: str, context: int) -> None:
        self._model, self._task = model, make_task("chat")
        chance = np.random.default_rng(2)
        texts = [chance.integers(0, model.spec.vocab_size, length) for length in lengths]
        rows: Rows = [[number] for number in range(len(lengths))]
        if way == "packed":
            packing = pack_rows(lengths, context + 1, 0)
            rows = [packing.of_row(row).tolist() for row in range(len(packing))]
        self.batches = []
        at_once = 8
        for first in range(0, len(rows), at_once):
            batch = rows[first : first + at_once]
            longest = max(sum(len(texts[number]) for number in row) for row in batch)
            width = longest if way == "padded to the longest" else context + 1
            self.batches.append(self._fields(batch, texts, width, way == "packed"))
        self.positions = sum(fields["ids"].numel() for fields in self.batches)
        self.loss = 0.0

    def _fields(
        self, rows: Rows, texts: list[np.ndarray], width: int, packed: bool
    ) -> dict[str, torch.Tensor]:
        raw = {"tokens": np.zeros((len(rows), width), np.int64)}
        raw["supervised"] = np.zeros((len(rows), width), np.uint8)
        documents = np.zeros((len(rows), width), np.int64)
        for row, numbers in enumerate(rows):
            place = 0
            for count, number in enumerate(numbers):
                end = place + len(texts[number])
                raw["tokens"][row, place:end] = texts[number]
                learnt = max(1, int(LEARNT * (end - place - 1)))
                raw["supervised"][row, end - learnt : end] = 1
                documents[row, place:end], place = count, end
            documents[row, place:] = len(numbers)
        return self._task.fields({**raw, "documents": documents} if packed else raw)

    def compute(self) -> None:
        self._model.zero_grad()
        self.loss = 0.0
        for fields in self.batches:
            loss = self._task.loss_sum(self._model.forward_part(fields, ()).outputs, fields)
            loss.backward()
            self.loss += loss.item()


def lengths_of(options: argparse.Namespace) -> np.ndarray:
    """Return the tokens of each conversation, of a dataset or log-normal ones."""
    if options.data:
        manifest = PairManifest.load(options.data)
        assert isinstance(manifest, PairManifest)
        with PairReader(manifest, "train") as reader:
            found = reader.lengths()[: options.chats]
    else:
        found = np.random.default_rng(1).lognormal(np.log(MEDIAN), SPREAD, options.chats)
    return found.astype(np.int64).clip(8, options.context + 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("rounds", 5),
        ("chats", 64),
        ("context", 1024),
        ("layers", 2),
        ("width", 128),
        ("heads", 4),
        ("vocabulary", 1024),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--data", type=Path, help="a dataset of chats, for its lengths")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    keep_pages()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {name: getattr(options, name) for name in ("layers", "width", "heads", "context")}
    model = read_spec({**sizes, "vocab_size": options.vocabulary}).build()
    lengths = lengths_of(options)
    contestants = {way: Contestant(model, lengths, way, options.context) for way in WAYS}
    for each in contestants.values():
        each.compute()
    losses = [each.loss for each in contestants.values()]
    difference = (max(losses) - min(losses)) / min(losses)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(options.rounds):
        for way in in_turn(list(WAYS), turn):
            seconds[way].append(seconds_of(contestants[way].compute, "cpu"))
    total = int(lengths.sum())
    print(
        f"{len(lengths)} conversations of {total / len(lengths):.0f} tokens on average, at most "
        f"{lengths.max()}, context {options.context:,}, {options.rounds} rounds"
    )
    figures: dict[str, object] = {"seconds": seconds, "difference": difference}
    packed = np.array(seconds["packed"])
    for way in WAYS:
        ratios = np.percentile(np.array(seconds[way]) / packed, [25, 50, 75])
        figures[f"{way}: speed of packing"] = ratios.tolist()
        low, middle, high = ratios
        share = total / contestants[way].positions
        rate = total / np.median(seconds[way])
        print(
            f"{way}: {rate:,.0f} tokens/cpu-s, {share:.0%} of the positions are tokens, "
            f"packing is {middle:.2f} [{low:.2f}..{high:.2f}] × as fast"
        )
        if way == WAYS[1]:
            reached = middle >= LEAST_SPEEDUP
    print(f"{'reached' if reached else 'MISSED':8s} {LEAST_SPEEDUP} × the padded ones")
    alike = difference <= MOST_DIFFERENCE
    print(f"{'reached' if alike else 'MISSED':8s} losses differ by {difference:.1e}")
    if options.json:
        options.json.write_text(json.dumps({**vars(options), **figures}, indent=1, default=str))


if __name__ == "__main__":
    main()
