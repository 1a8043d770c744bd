"""Measure one GPU's training speed: mpillm in turns with a plain PyTorch loop of the same model.

    python benchmarks/gpu/speed.py [--quick] --out speed.json

mpillm is its real Trainer, as train/setup.py makes it from a recipe. The plain loop has the same
module compiled, under autocast, with fused AdamW and clipping. Both take bfloat16 and the same
batch. MFU counts ModelSpec.flops_per_token (the whole attention square, as PaLM does) over the
chip's dense bfloat16 peak.
"""

import argparse
import gc
import json
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn
from torch.nn import functional as F

from mpillm.bench.timing import in_turn
from mpillm.errors import RecipeError
from mpillm.models.part_module import PartModule, WithoutValues
from mpillm.models.spec import ModelSpec
from mpillm.system.console import Console
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.train import setup
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.step import Trainer

# Dense bfloat16 products, TFLOP/s, from the makers' data sheets; the first name that is in the
# chip's counts.
PEAKS = {
    "GB200": 2500,
    "B200": 2250,
    "H200 NVL": 835,
    "H200": 989,
    "GH200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "A30": 165,
    "A40": 150,
    "A10": 125,
    "L40S": 362,
    "L4": 121,
    "MI325X": 1307,
    "MI300X": 1307,
    # One of the two chips, which is a device of its own.
    "MI250X": 191,
}
PLAIN = "plain PyTorch, compiled"
# Settings beside the recipe's. A variant with a key that this mpillm does not have is left out.
VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "mpillm": {},
    "mpillm, compiled": {"train": {"compile": True}},
    "mpillm, full recompute": {"train": {"recompute": "full"}},
}
WARM_STEPS = 3
# Never reached: a schedule of this length keeps its rate nearly constant.
STEPS = 100_000
# Of what a plan leaves out: norms' outputs, casts, the allocator's rest.
ACTIVATIONS_FACTOR, LOGITS_BYTES = 1.5, 16
# Weights, gradients, masters and averages of one contestant, a parameter.
STATE_BYTES = 20


@dataclass(frozen=True)
class Shape:
    """A model to measure, and the most sequences at once."""

    name: str
    model: Mapping[str, Any]
    most_rows: int
    variants: Sequence[str] = tuple(VARIANTS)
    rounds: int = 7
    turn_seconds: float = 1.0
    needs_seconds: float = 0.0
    """Left out where less time is left."""


SHAPES = (
    # The vocabulary is rounded up to a multiple of 64, as is usual: odd products are slow.
    Shape("GPT-2 124M", {"shape": "gpt2-124m", "vocab_size": 50304}, 64),
    Shape(
        "1B Llama shape",
        {"shape": "llama-1b", "context": 2048},
        16,
        # Each holds 22 GB; a third would leave less for the batch.
        ("mpillm", "mpillm, compiled"),
        rounds=5,
        turn_seconds=1.5,
        needs_seconds=90.0,
    ),
)
TINY = (
    Shape(
        "tiny",
        {"layers": 2, "width": 32, "heads": 4, "context": 32},
        4,
        rounds=2,
        turn_seconds=0.05,
    ),
)
# Text of many different bytes: gradients of few embeddings would all be added to few rows.
LETTERS = [chr(number) for number in (*range(32, 127), *range(161, 1024))]


def peak_flops(chip: str) -> float | None:
    """Return the dense bfloat16 peak of a chip in FLOP/s; None for an unknown one."""
    found = next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", chip)), None)
    return None if found is None else found * 1e12


class OutOfMemory(Exception):
    """The batch or a contestant does not fit."""


# The contestants ----------------------------------------------------------------------------------


@dataclass
class Contestant:
    """A loop to measure: `step` trains on one batch, and may return before the GPU has done it."""

    name: str
    step: Callable[[], object]
    loss: Callable[[], float]
    held: int = 0
    """Bytes that it holds between its turns."""
    peak: int = 0
    """The most bytes that it has used at once."""
    rates: list[float] = field(default_factory=list)
    """Tokens a second, by round."""


class WholeLoss(nn.Module):
    """The whole model with its mean loss."""

    def __init__(self, part: PartModule) -> None:
        super().__init__()
        self.part = part

    def forward(self, ids_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        (logits_BTV,) = self.part.forward_part({"ids": ids_BT}, ()).outputs
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())


def plain_loop(trainer: Trainer, spec: ModelSpec, rows: int, compiled: bool) -> Contestant:
    """Make the plain loop, with the trainer's weights; its batch is on the device already."""
    device = trainer.model.device
    before = allocated(device)
    with device, WithoutValues():
        part = spec.build()
    part.to(device)
    with torch.no_grad():
        for name, weight in part.named_weights():
            weight.copy_(trainer.stepped[name])
    count = rows * (spec.context + 1)
    octets = np.frombuffer(random_text(random.Random(2), count).encode(), np.uint8)[:count]
    ids_BT = torch.from_numpy(octets.astype(np.int64)).view(rows, -1).to(device)
    fields = ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()
    whole: nn.Module = WholeLoss(part)
    model = torch.compile(whole) if compiled else whole
    weights = list(part.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for w in weights if w.dim() > 1], "weight_decay": 0.1},
            {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-4,
        betas=(0.9, 0.95),
        fused=True,
    )
    last: list[torch.Tensor] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(*fields)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        last[:] = [loss.detach()]

    name = PLAIN if compiled else PLAIN.removesuffix(", compiled")
    return Contestant(name, step, lambda: float(last[0]), allocated(device) - before)


def compiled_or_not(
    trainer: Trainer, spec: ModelSpec, rows: int, compiled: bool, notes: list[str]
) -> Contestant:
    """Make the plain loop and take its first step; where it does not compile, take it as it is."""
    if compiled:
        made = plain_loop(trainer, spec, rows, True)
        try:
            take_turn(made, 1, trainer.model.device)
            return made
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            reason = str(failure).splitlines()[0][:200]
            notes.append(f"the plain loop is not compiled: {type(failure).__name__}: {reason}")
        del made
    return plain_loop(trainer, spec, rows, False)


def our_loop(name: str, trainer: Trainer, held: int) -> Contestant:
    """Make a contestant of a trainer that holds `held` bytes: its steps follow each other."""
    done = [0]
    losses = [math.nan]

    def step() -> None:
        losses[0] = trainer.step(done[0]).loss
        done[0] += 1

    return Contestant(name, step, lambda: losses[0], held)


Made = dict[str, tuple[Trainer, int]]
"""By name: a trainer, and the bytes that it holds."""


def with_trainers(
    recipes: Mapping[str, Recipe],
    then: Callable[[Made], None],
    notes: list[str],
    device: torch.device,
) -> None:
    """Call `then` with a trainer of each recipe, all alive at once.

    `train` makes each as for a real run, and gives it to the loop of steps. That is this function
    again: it makes the next trainer. A trainer that does not fit beside the others is left out.
    """
    made: Made = {}
    waiting = list(recipes.items())
    name, before = "", 0

    class Loop:
        def __init__(self, *given: Any) -> None:
            self.trainer = next(each for each in given if isinstance(each, Trainer))

        def run(self, checkpoint: object) -> None:
            made[name] = self.trainer, allocated(device) - before
            go_on()

    def go_on() -> None:
        nonlocal name, before
        if not waiting:
            then(made)
            return
        name, recipe = waiting.pop(0)
        begun, before, fits = len(made), allocated(device), True
        try:
            setup.train(recipe, MPI.COMM_SELF, Console(speaks=False))
        except (MemoryError, torch.OutOfMemoryError):
            # The first alone, or a step of all: the batch is too large.
            if len(made) > begun or not made:
                raise
            fits = False
        # After the exception, which keeps what was made in vain.
        if not fits:
            notes.append(f"{name}: left out, no memory for it next to the others")
            free_memory(device)
            go_on()

    real, setup.TrainingLoop = setup.TrainingLoop, Loop  # type: ignore[assignment,misc]
    try:
        go_on()
    finally:
        setup.TrainingLoop = real  # type: ignore[misc]


# Turns --------------------------------------------------------------------------------------------


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def take_turn(each: Contestant, steps: int, device: torch.device) -> float:
    """Run `steps` of a contestant; return the seconds until the device has done them."""
    others = allocated(device) - each.held
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for _ in range(steps):
        each.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        each.peak = max(each.peak, torch.cuda.max_memory_allocated(device) - others)
        each.held = torch.cuda.memory_allocated(device) - others
    return time.perf_counter() - begun


def first_steps(each: Contestant, device: torch.device) -> None:
    """Take the first steps, which allocate, compile and choose kernels."""
    seconds = take_turn(each, WARM_STEPS, device)
    print(f"{each.name}: {WARM_STEPS} first steps {seconds:.1f} s", flush=True)


def measure(
    contestants: Sequence[Contestant], shape: Shape, tokens: int, device: torch.device, until: float
) -> None:
    """Let all take turns; every round gives a rate each. Fewer rounds where time is short."""
    steps = {}
    for each in contestants:
        # Once more: what the first steps alone needed is no part of a run's peak.
        each.peak = 0
        seconds = take_turn(each, 1, device)
        steps[each.name] = max(2, math.ceil(shape.turn_seconds / seconds))
    names = [each.name for each in contestants]
    by_name = {each.name: each for each in contestants}
    for turn in range(shape.rounds):
        if turn > 1 and time.monotonic() > until:
            print(f"no time for more than {turn} rounds")
            break
        for name in in_turn(names, turn):
            seconds = take_turn(by_name[name], steps[name], device)
            by_name[name].rates.append(steps[name] * tokens / seconds)


def first_rows(spec: ModelSpec, shape: Shape, contestants: int, device: torch.device) -> int:
    """Estimate how many sequences fit at once, as a power of two."""
    if device.type == "cpu":
        return shape.most_rows
    free = torch.cuda.mem_get_info(device)[0] * 0.9 - STATE_BYTES * spec.parameters * contestants
    row = ACTIVATIONS_FACTOR * spec.activation_bytes(spec.whole, 1, 2)
    row += LOGITS_BYTES * spec.context * spec.vocab_size
    rows = max(1, int(free / row))
    return min(shape.most_rows, 1 << (rows.bit_length() - 1))


# Shapes -------------------------------------------------------------------------------------------


def recipe_of(
    shape: Shape, rows: int, folder: Path, device: str, more: Mapping[str, Mapping[str, Any]]
) -> Recipe:
    """Make the recipe of a variant; raises RecipeError for a setting that there is not."""
    table: dict[str, dict[str, Any]] = {
        "model": dict(shape.model),
        "data": {"path": str(folder / "data")},
        "optimizer": {"learning_rate": 1e-4},
        "train": {
            "run": str(folder / f"run-{random.randrange(1 << 32):08x}"),
            "steps": STEPS,
            "batch": rows,
            "microbatch": rows,
            "device": device,
            "dtype": "bfloat16",
        },
    }
    for name, section in more.items():
        table[name] = {**table.get(name, {}), **section}
    return parse_recipe(table, shape.name)


def measured_shape(
    shape: Shape, options: argparse.Namespace, folder: Path, until: float
) -> dict[str, Any]:
    """Measure a shape with the largest batch that fits; return its table."""
    device = torch.device(options.device)
    notes: list[str] = []
    variants = {}
    for name in shape.variants:
        try:
            recipe_of(shape, 1, folder, options.device, VARIANTS[name])
            variants[name] = VARIANTS[name]
        except RecipeError:
            notes.append(f"{name}: left out, this mpillm has no such setting")
    spec = recipe_of(shape, 1, folder, options.device, {}).model
    spec = spec.replace(vocab_size=spec.vocab_size or 512)
    rows = first_rows(spec, shape, 1 + len(variants), device)
    while True:
        found: list[Contestant] = []
        recipes = {
            name: recipe_of(shape, rows, folder, options.device, more)
            for name, more in variants.items()
        }

        def race(trainers: Made, rows: int = rows, found: list[Contestant] = found) -> None:
            first, _ = next(iter(trainers.values()))
            model, place = first.recipe.model, first.model.device
            found[:] = [our_loop(name, *made) for name, made in trainers.items()]
            for each in found:
                first_steps(each, place)
            found.append(compiled_or_not(first, model, rows, not options.no_compile, notes))
            first_steps(found[-1], place)
            measure(found, shape, rows * model.context, place, until)

        full = False
        try:
            with_trainers(recipes, race, notes, device)
        except (MemoryError, torch.OutOfMemoryError):
            full = True
        if not full:
            break
        found.clear()
        free_memory(device)
        if rows == 1:
            raise OutOfMemory(f"{shape.name}: one sequence does not fit in the GPU's memory")
        print(f"{shape.name}: {rows} sequences at once do not fit, taking {rows // 2}")
        rows //= 2
    return table_of(shape, spec, rows, found, notes)


def table_of(
    shape: Shape, spec: ModelSpec, rows: int, found: Sequence[Contestant], notes: list[str]
) -> dict[str, Any]:
    """Make the table of a shape, and keep its numbers."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = peak_flops(chip)
    plain = found[-1]
    lines, numbers = [], []
    for each in found:
        low, rate, high = quartiles(each.rates)
        ratios = quartiles([a / b for a, b in zip(each.rates, plain.rates, strict=True)])
        mfu = None if peak is None else rate * spec.flops_per_token / peak
        memory = each.peak / 2**30
        numbers.append(
            {
                "name": each.name,
                "tokens_per_second": [low, rate, high],
                "to_plain": ratios,
                "mfu": mfu,
                "peak_bytes": each.peak,
                "loss": each.loss(),
            }
        )
        lines.append(
            [
                each.name,
                f"{rate:,.0f} [{low:,.0f}..{high:,.0f}]",
                "1" if each is plain else "{1:.3f} [{0:.3f}..{2:.3f}]".format(*ratios),
                "–" if mfu is None else f"{mfu:.1%}",
                f"{memory:.1f} GiB",
            ]
        )
    if peak is None:
        notes.append(f"no MFU: the bfloat16 peak of {chip} is not in the table of speed.py")
    title = (
        f"{shape.name}: {spec.parameters:,} parameters, {rows} × {spec.context} tokens a step, "
        "bfloat16"
    )
    head = ["", "tokens/s", "to plain PyTorch", "MFU", "peak memory"]
    return {
        "title": title,
        "head": head,
        "rows": lines,
        "notes": list(dict.fromkeys(notes)),
        "numbers": numbers,
        "batch_rows": rows,
        "context": spec.context,
        "parameters": spec.parameters,
        "flops_per_token": spec.flops_per_token,
        "peak_flops": peak,
    }


def quartiles(values: Sequence[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, [25, 50, 75])]


def random_text(chance: random.Random, count: int) -> str:
    return "".join(chance.choices(LETTERS, k=count))


def write_data(folder: Path) -> None:
    """Prepare a dataset of random bytes, longer than a step of any shape."""
    chance, text = random.Random(1), folder / "texts"
    text.mkdir()
    for number in range(8):
        (text / f"{number}.txt").write_text(random_text(chance, 1 << 18), encoding="utf-8")
    options = PrepareOptions((str(text),), folder / "data", tokenizer="bytes", validation=0.0)
    prepare(options, MPI.COMM_SELF, Console(speaks=False))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="GPT-2 alone, in fewer rounds")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the plain loop")
    parser.add_argument("--seconds", type=float, default=400.0, help="end within this time")
    parser.add_argument("--out", type=Path, help="write the figures to this file")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    end = time.monotonic() + options.seconds
    shapes = TINY if options.device == "cpu" else SHAPES[:1] if options.quick else SHAPES
    tables: list[dict[str, Any]] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="mpillm-speed-") as folder:
        write_data(Path(folder))
        for number, shape in enumerate(shapes):
            print(f"{shape.name}:", flush=True)
            if end - time.monotonic() < shape.needs_seconds:
                print(f"{shape.name}: left out, no time is left", flush=True)
                continue
            # The others' time, and some to end in.
            later = sum(other.needs_seconds for other in shapes[number + 1 :])
            try:
                table = measured_shape(shape, options, Path(folder), end - later - 10)
            except (OutOfMemory, RuntimeError) as failure:
                print(f"{shape.name}: {failure}", flush=True)
                failed = True
                continue
            tables.append(table)
            for line in table["rows"]:
                print("  ".join(line), flush=True)
            if options.out:
                # At once: the step may be ended by its limit.
                options.out.write_text(json.dumps({"shapes": tables}))
            free_memory(torch.device(options.device))
    return failed


if __name__ == "__main__":
    sys.exit(main())
