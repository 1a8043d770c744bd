"""Print what a compression changed: bytes, loss and speed, before and after."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mpillm.infer.compress.calibration_rows import ModelFigures
from mpillm.infer.compress.compress_model import CompressedModel
from mpillm.system.console import Console, binary_bytes
from mpillm.system.json_text import to_json
from mpillm.system.messages import command


def print_compression(made: CompressedModel, out: Path, as_json: bool, console: Console) -> None:
    """Print the figures before and after, and the command that uses the model."""
    if as_json:
        value = {**asdict(made), "checkpoint": str(made.checkpoint)}
        console.write(to_json(value) + "\n")
        return
    rows: Sequence[tuple[str, ...]] = [
        _row("before", made.before, made.before),
        _row("after", made.after, made.before),
    ]
    columns = ("model", "bytes", "share", "NLL", "change", "tokens/s read", "tokens/s written")
    data = (
        f", NLL in nats over {made.before.tokens:,} held-out tokens" if made.before.tokens else ""
    )
    console.table(f"{made.checkpoint}{data}", columns, rows)
    if made.zeros:
        share = made.zeros / made.weights
        console.say(f"{made.zeros:,} of {made.weights:,} weights of layers are 0 ({share:.4%})")
    if made.before.loss is None:
        console.say("no held-out data, so no NLL: name a prepared folder with --data")
    console.say(f"next: {command(['mpillm', 'evaluate', out])}")


def _row(name: str, found: ModelFigures, before: ModelFigures) -> tuple[str, ...]:
    change = ""
    if found is not before and found.loss is not None and before.loss is not None:
        change = f"{found.loss - before.loss:+.4f}"
    return (
        name,
        binary_bytes(found.nbytes),
        f"{found.nbytes / before.nbytes:.3f}",
        "" if found.loss is None else f"{found.loss:.4f}",
        change,
        "" if found.read_rate is None else f"{found.read_rate:,.0f}",
        "" if found.write_rate is None else f"{found.write_rate:,.1f}",
    )
