"""Print what a source of tensors holds, or how two differ: the work of `mpillm inspect`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.errors import UsageError
from mpillm.system.console import Console, binary_bytes, counted
from mpillm.system.json_text import to_json
from mpillm.system.messages import some_of
from mpillm.weights.inspection import Difference, TensorFigures, compare, measure, select
from mpillm.weights.open_source import open_source
from mpillm.weights.tensor_source import TensorSource

if TYPE_CHECKING:
    from mpi4py import MPI

# What is shown of the facts of each kind: config.json's keys, GGUF's, a checkpoint's.
SHOWN_FACTS = (
    "step",
    "data",
    "model_type",
    "architectures",
    "dtype",
    "torch_dtype",
    "general.architecture",
    "general.name",
    "general.license",
)


def print_inspection(
    path: Path,
    other: Path | None,
    patterns: Sequence[str],
    as_json: bool,
    comm: "MPI.Intracomm",
    console: Console,
) -> None:
    """Print the tensors at `path` whose names match one of `patterns`; with `other`, how those of
    the two differ.

    Every rank calls it; they share the reading. Raises CheckpointError and UsageError.
    """
    # One JSON object is all that --json prints: no progress.
    progress = Console(speaks=False) if as_json else console
    source = open_source(path, comm, progress)
    names = select(source.tensors, patterns)
    if not names:
        raise UsageError(
            f"no tensor of {path} matches {', '.join(patterns)}; its names begin with "
            f"{some_of(source.tensors)}"
        )
    if other is None:
        total = sum(source.tensors[name].nbytes for name in names)
        with progress.progress("read", total, "bytes") as work:
            figures = measure(source, names, comm, work)
        (_write_tensors if as_json else _print_tensors)(source, figures, console)
    else:
        _print_difference(
            source, open_source(other, comm, progress), patterns, as_json, comm, console
        )


def _facts(source: TensorSource) -> dict[str, Any]:
    facts = source.facts
    shown = {key: facts[key] for key in SHOWN_FACTS if facts.get(key) is not None}
    recipe = facts.get("recipe")
    if isinstance(recipe, dict) and isinstance(recipe.get("model"), dict):
        shown["model"] = {
            key: value for key, value in recipe["model"].items() if value not in ("", 0, False)
        }
    return shown


def _write_tensors(
    source: TensorSource, figures: Mapping[str, TensorFigures], console: Console
) -> None:
    value = {
        "path": str(source.path),
        "kind": source.kind,
        "facts": _facts(source),
        "elements": source.elements,
        "bytes": source.nbytes,
        "tensors": {
            name: {**asdict(source.tensors[name]), **asdict(found)}
            for name, found in figures.items()
        },
    }
    console.write(to_json(value) + "\n")


def _print_tensors(
    source: TensorSource, figures: Mapping[str, TensorFigures], console: Console
) -> None:
    facts = {name: _text(value) for name, value in _facts(source).items()}
    count = counted(len(source.tensors), "tensor")
    size = f"{count}, {source.elements:,} elements, {binary_bytes(source.nbytes)}"
    console.facts(f"{source.path}: {source.kind}", {**facts, "holds": size})
    rows: list[tuple[str, ...]] = []
    for name, found in figures.items():
        info = source.tensors[name]
        shape = " × ".join(f"{size:,}" for size in info.shape) or "scalar"
        strange = f"{found.not_finite:,}" if found.not_finite else ""
        numbers = f"{found.norm:.4g}", f"{found.largest:.4g}", strange
        rows.append((name, info.dtype, shape, f"{math.prod(info.shape):,}", *numbers))
    columns = ["tensor", "dtype", "shape", "elements", "norm", "largest", "not finite"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    console.table("", columns, rows)


def _print_difference(
    source: TensorSource,
    other: TensorSource,
    patterns: Sequence[str],
    as_json: bool,
    comm: "MPI.Intracomm",
    console: Console,
) -> None:
    ours, theirs = select(source.tensors, patterns), set(select(other.tensors, patterns))
    shared = [name for name in ours if name in theirs]
    shapes = {name: (source.tensors[name].shape, other.tensors[name].shape) for name in shared}
    alike = [name for name in shared if shapes[name][0] == shapes[name][1]]
    total = sum(source.tensors[name].nbytes for name in alike)
    with (Console(speaks=False) if as_json else console).progress("read", total, "bytes") as work:
        found = compare(source, other, alike, comm, work)
    differing = {name: difference for name, difference in found.items() if difference.largest}
    only_ours = [name for name in ours if name not in theirs]
    only_theirs = sorted(theirs.difference(ours))
    reshaped = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    if as_json:
        value = {
            "paths": [str(source.path), str(other.path)],
            "equal": not (differing or only_ours or only_theirs or reshaped),
            "compared": len(alike),
            "differing": {name: asdict(each) for name, each in differing.items()},
            "reshaped": reshaped,
            "only_in_first": only_ours,
            "only_in_second": only_theirs,
        }
        console.write(to_json(value) + "\n")
        return
    console.say(
        f"{len(alike) - len(differing):,} of {counted(len(alike), 'tensor')} of both are equal"
    )
    if differing:
        console.table("", ("tensor", "largest difference", "relative"), _rows(differing))
    for path, names in ((source.path, only_ours), (other.path, only_theirs)):
        if names:
            console.say(f"only in {path}: {counted(len(names), 'tensor')} ({some_of(names)})")
    for name, (first, second) in reshaped.items():
        console.say(f"{name}: {list(first)} in {source.path}, {list(second)} in {other.path}")


def _rows(differing: Mapping[str, Difference]) -> list[tuple[str, str, str]]:
    return [
        (name, f"{each.largest:.4g}", f"{each.relative:.3g}") for name, each in differing.items()
    ]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
