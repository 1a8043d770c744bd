"""Print the rows of an evaluation set found in training text: the work of `contamination`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_root
from mpillm.errors import UsageError
from mpillm.infer.leakage.contamination import (
    MOSTLY,
    ContaminatedRow,
    Contamination,
    find_contamination,
)
from mpillm.infer.leakage.split_text import SplitText
from mpillm.system.atomic import check_new_file, write_new_file
from mpillm.system.console import Console
from mpillm.system.json_text import to_json, to_json_lines
from mpillm.tokens.manifest import Manifest, check_tokenizer

if TYPE_CHECKING:
    from mpi4py import MPI

EXAMPLES, SHOWN = 5, 120


def print_contamination(
    training: Path,
    evaluation: Path | None,
    n: int,
    most: int,
    outputs: Path | None,
    as_json: bool,
    comm: "MPI.Intracomm",
    console: Console,
) -> None:
    """Find the rows of `evaluation` in the training split of `training`, and print them.

    `evaluation`: a prepared folder, of which the validation split is taken, or all where it has
    none; None: the validation split of `training`. Every rank calls it. Raises MismatchError where
    their tokenizers differ, UsageError where `outputs` exists.
    """
    on_root(comm, lambda: check_new_file(outputs, "--outputs"))
    trained = on_root(comm, lambda: Manifest.load(training))
    asked = trained if evaluation is None else on_root(comm, lambda: Manifest.load(evaluation))
    tokenizer = on_root(comm, trained.load_tokenizer)
    on_root(comm, lambda: check_tokenizer(asked, tokenizer))
    split = "validation" if asked.splits["validation"].n_tokens else "train"
    if split == "train" and asked.manifest_hash == trained.manifest_hash:
        raise UsageError(
            f"{training} has no validation split, and all of its rows are training text; name the "
            "evaluation set, or prepare it with a --validation above 0"
        )
    quiet = Console(speaks=False) if as_json else console
    given = tokenizer, n, most, comm, quiet
    with SplitText(asked, split, tokenizer) as rows, SplitText(trained, "train", tokenizer) as text:
        found = find_contamination(rows, text, *given)
    facts = {"training": str(training), "evaluation": str(asked.folder), "split": split}
    if as_json:
        examples = [asdict(row) for row in _largest(found)]
        console.write(to_json({**facts, **found.to_json(), "examples": examples}) + "\n")
    else:
        _print_table(
            f"the {split} split of {asked.folder} in the text of {training}", found, console
        )
    lines = to_json_lines(asdict(row) for row in found.found)
    on_root(comm, lambda: write_new_file(outputs, lines, "--outputs"))


def _print_table(title: str, found: Contamination, console: Console) -> None:
    rows = len(found.found)
    facts = {
        "rows found": f"{_share(rows, found.rows)}, with {found.n} tokens in a row or more",
        f"{MOSTLY:.0%} or more of their tokens": _share(found.mostly, found.rows),
        "tokens found": _share(found.covered, found.tokens),
    }
    if found.short_rows:
        facts["rows too short to be found"] = f"{found.short_rows:,}; --tokens is lower for them"
    if found.common:
        facts["common phrases left out"] = f"{found.common:,} of {found.n} tokens"
    console.facts(title, facts)
    runs = {
        f"row {row.row:,}": f"{row.longest:,} tokens of a run, {row.covered:,} of {row.tokens:,} "
        f"in all; {row.times:,} times in the training text, first in document {row.document:,} of "
        f"{row.shard}: {' '.join(row.text.split())[:SHOWN]}"
        for row in _largest(found)
    }
    if runs:
        console.facts("the longest runs", runs)


def _largest(found: Contamination) -> list[ContaminatedRow]:
    return sorted(found.found, key=lambda row: (-row.longest, row.row))[:EXAMPLES]


def _share(count: int, of: int) -> str:
    return f"{count:,} of {of:,} ({count / max(of, 1):.2%})"
