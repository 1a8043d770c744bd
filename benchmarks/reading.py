"""Measure how fast windows of tokens are read, compared with os.preadv and numpy.memmap.

    python benchmarks/reading.py --rounds 15 --windows 16384

Each variant reads windows at new random places each round, so that none finds those of another in
the processor's cache. The order changes from round to round; files are warm, and the batch buffer
is reused. Figures are CPU time (time.process_time).
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.bench.timing import in_turn
from mpillm.tokens.manifest import NO_TOKENIZER, Manifest, Split
from mpillm.tokens.reader import TokenReader, open_split
from mpillm.tokens.sampler import PLANNED_SAMPLES, Sampler
from mpillm.tokens.shards import Documents, write_shard
from mpillm.tokens.windows import ReadPlan

CONTEXT = 1024
ROWS = 64
N_SHARDS = 8
MEAN_DOCUMENT_TOKENS = 3866  # as in a web corpus: 537 M tokens in 138,888 documents

Ids = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Corpus:
    """The same tokens as a dataset and as one raw file."""

    dataset: Path
    raw: Path
    n_tokens: int


def build(folder: Path, mebibytes: int) -> Corpus:
    generator = np.random.default_rng(0)
    dataset, raw = folder / "dataset", folder / "tokens.bin"
    dataset.mkdir()
    n_tokens = (mebibytes << 20) // 2 // N_SHARDS
    shards = []
    with raw.open("wb") as file:
        for number in range(N_SHARDS):
            tokens = generator.integers(0, 32768, n_tokens, np.uint16)
            lengths = 1 + generator.exponential(
                MEAN_DOCUMENT_TOKENS, 2 * n_tokens // MEAN_DOCUMENT_TOKENS
            ).astype(int)
            ends = np.cumsum(lengths)
            ends = np.append(ends[ends < n_tokens], n_tokens)
            documents = Documents(tokens, ends, np.zeros(len(ends)), np.zeros(len(ends)))
            shards.append(write_shard(dataset / f"train-{number:05d}.h5", documents, {}))
            file.write(tokens.tobytes())
    total = sum(shard.n_docs for shard in shards)
    splits = {
        "train": Split(N_SHARDS * n_tokens, total, 0, tuple(shards)),
        "validation": Split(0, 0, 0, ()),
    }
    Manifest(dataset, NO_TOKENIZER, {}, splits).save()
    return Corpus(dataset, raw, N_SHARDS * n_tokens)


def batches(starts: Ids) -> Iterator[list[int]]:
    """Yield the starts of each batch, as byte offsets in the raw file."""
    for first in range(0, len(starts), ROWS):
        yield (starts[first : first + ROWS] * 2).tolist()


def raw_preadv(corpus: Corpus, starts: Ids, buffer: Ids) -> None:
    descriptor, preadv, nbytes = os.open(corpus.raw, os.O_RDONLY), os.preadv, 2 * (CONTEXT + 1)
    for offsets in batches(starts):
        for row, offset in zip(buffer, offsets, strict=True):
            if preadv(descriptor, (row,), offset) != nbytes:
                raise EOFError
    os.close(descriptor)


def raw_preadv_tuned(corpus: Corpus, starts: Ids, buffer: Ids) -> None:
    """Read as raw_preadv, with the views of the shard reader: then only the shards differ."""
    descriptor, preadv, nbytes = os.open(corpus.raw, os.O_RDONLY), os.preadv, 2 * (CONTEXT + 1)
    for offsets in batches(starts):
        flat = buffer.reshape(-1).data.cast("B")
        rows = [(flat[start : start + nbytes],) for start in range(0, len(flat), nbytes)]
        for row, offset in zip(rows, offsets, strict=True):
            if preadv(descriptor, row, offset) != nbytes:
                raise EOFError
    os.close(descriptor)


def raw_memmap(corpus: Corpus, starts: Ids, buffer: Ids) -> None:
    mapped = np.memmap(corpus.raw, np.uint16, "r")
    for first in range(0, len(starts), ROWS):
        for row, start in enumerate(starts[first : first + ROWS].tolist()):
            buffer[row] = mapped[start : start + CONTEXT + 1]


def shard_fetch(reader: TokenReader, starts: Ids, buffer: Ids) -> None:
    """Plan places and read them; no order, no document boundaries."""
    for block in range(0, len(starts), PLANNED_SAMPLES):
        plan = ReadPlan(
            reader, starts[block : block + PLANNED_SAMPLES], CONTEXT + 1, boundaries=False
        )
        for first in range(0, len(plan.starts), ROWS):
            plan.fetch(first, buffer)


def whole_sample(sampler: Sampler, first_step: int, windows: int, buffer: Ids) -> None:
    for step in range(first_step, first_step + windows // ROWS):
        sampler.windows(step, 0, ROWS, buffer)


def measure(corpus: Corpus, rounds: int, windows: int) -> dict[str, list[float]]:
    """Measure the CPU seconds of a window, by variant and round."""
    buffer = np.empty((ROWS, CONTEXT + 1), np.uint16)
    generator = np.random.default_rng(int(time.time()))
    seconds: dict[str, list[float]] = {}
    for number in range(rounds):
        draw = partial(generator.integers, 0, corpus.n_tokens - CONTEXT, windows)
        reader = open_split(corpus.dataset)
        plain = Sampler(reader, CONTEXT, ROWS, number, readahead=False)
        ahead = Sampler(reader, CONTEXT, ROWS, number, readahead=True)
        variants: dict[str, Callable[[Ids], None]] = {
            "preadv, raw file": lambda s: raw_preadv(corpus, s, buffer),
            "preadv, raw file, sliced views": lambda s: raw_preadv_tuned(corpus, s, buffer),
            "numpy.memmap slices, raw file": lambda s: raw_memmap(corpus, s, buffer),
            "shard reader, fetch": lambda s, r=reader: shard_fetch(r, s, buffer),
            "whole sample": lambda s, p=plain: whole_sample(p, 0, len(s), buffer),
            "whole sample, readahead on": lambda s, a=ahead: whole_sample(a, 0, len(s), buffer),
        }
        names = list(variants)
        for name in in_turn(names, number):
            starts = draw()
            begun = time.process_time()
            variants[name](starts)
            seconds.setdefault(name, []).append((time.process_time() - begun) / windows)
        reader.close()
    return seconds


def show(seconds: dict[str, list[float]]) -> None:
    base = seconds["preadv, raw file"]
    mapped = seconds["numpy.memmap slices, raw file"]
    print(
        f"{'variant':32} {'µs/window':>10} {'min–max':>14} {'speed / preadv':>15} "
        f"{'speed / memmap':>15}"
    )
    for name in sorted(seconds, key=lambda name: ("raw" not in name, name)):
        own = seconds[name]
        spread = f"{min(own) * 1e6:.2f}–{max(own) * 1e6:.2f}"
        figures = f"{ratio(base, own):15.2f} {ratio(mapped, own):15.2f}"
        print(f"{name:32} {statistics.median(own) * 1e6:10.2f} {spread:>14} {figures}")
    fetch, whole = seconds["shard reader, fetch"], seconds["whole sample"]
    goals = [
        (
            "fetch ≥ 0.95 × the speed of preadv on a raw file",
            ratio(base, fetch),
            ratio(base, fetch) >= 0.95,
        ),
        (
            "fetch ≥ 1.4 × the speed of numpy.memmap slices",
            ratio(mapped, fetch),
            ratio(mapped, fetch) >= 1.4,
        ),
        (
            "whole sample ≤ 3 × the cost of preadv alone",
            ratio(whole, base),
            ratio(whole, base) <= 3,
        ),
    ]
    for text, value, reached in goals:
        print(f"{'reached' if reached else 'MISSED ':8} {text}: {value:.2f}")


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the median over rounds of one / other: a slow round cancels out."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--windows", type=int, default=16384, help="per round and variant, a multiple of 64"
    )
    parser.add_argument("--mebibytes", type=int, default=512, help="of tokens")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to build the corpus (removed after); default: a temporary one",
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mpillm-reading-", dir=options.folder))
    try:
        corpus = build(folder, options.mebibytes)
        corpus.raw.read_bytes()  # warm
        show(measure(corpus, options.rounds, options.windows // ROWS * ROWS))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
