"""Print how much of its training text a model writes again: the work of `memorisation`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import DataError, MismatchError, UsageError
from mpillm.infer.leakage.memorisation import (
    Memorisation,
    Passage,
    Reproduction,
    cut_passages,
    passage_tokens,
    reproduce,
    sample_passages,
)
from mpillm.infer.loading import Loaded, load_data, load_trained, open_of
from mpillm.machine.node_map import map_nodes
from mpillm.models.part_module import torch_explained
from mpillm.parallel.devices import choose_device
from mpillm.system.atomic import check_new_file, write_new_file
from mpillm.system.console import Console
from mpillm.system.json_text import to_json, to_json_lines
from mpillm.system.messages import explain
from mpillm.system.plain_files import read_text
from mpillm.tokens.manifest import Manifest, check_tokenizer
from mpillm.tokens.pairs.pair_manifest import PairManifest
from mpillm.tokens.pairs.pair_shards import PAIR_KINDS
from mpillm.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mpi4py import MPI

EXAMPLES, SHOWN = 3, 300
TEXTS = "texts"


@dataclass(frozen=True)
class MemorisationSettings:
    """What is asked of `memorisation`.

    `passages`: to draw of each split. `prompt`, `tokens`: those that the model is given, and those
    that should follow; None: 50, or half of the context. `texts`: a file of texts to try in place
    of drawn ones, a line each.
    """

    passages: int = 1000
    prompt: int | None = None
    tokens: int | None = None
    seed: int = 0
    texts: Path | None = None
    outputs: Path | None = None
    as_json: bool = False


def print_memorisation(
    trained: Path,
    data: Path | None,
    asked: MemorisationSettings,
    comm: "MPI.Intracomm",
    console: Console,
    device: str = "auto",
) -> None:
    """Let a model continue passages of its training text, and print what it reproduces.

    `data`: None for that of the run. Passages of the validation split are the reference. Every
    rank calls it. Raises MismatchError for a model that continues no text, or other data.
    """
    place, _ = choose_device(device, comm, map_nodes(comm), option="--device")
    on_root(comm, lambda: check_new_file(asked.outputs, "--outputs"))
    loaded = load_trained(trained, comm, console)
    spec, tokenizer = loaded.model.spec, loaded.tokenizer
    lengths = passage_tokens(spec, asked.prompt, asked.tokens)
    quiet = Console(speaks=False) if asked.as_json else console
    if asked.texts is not None:
        file = asked.texts
        passages = {TEXTS: on_root(comm, lambda: _read_texts(file, tokenizer, lengths))}
        facts = {"texts": str(file)}
    else:
        manifest = _load_data(loaded, data, comm)
        passages = on_all(comm, lambda: _sample(manifest, asked, lengths))
        facts = {"data": str(manifest.folder)}
    model = loaded.model.to(place)
    with torch_explained():
        found = {name: reproduce(model, each, comm, quiet) for name, each in passages.items()}
    figures = {name: Memorisation.of(each) for name, each in found.items()}
    first = found[next(iter(found))]
    shown = sorted(first, key=lambda each: (-each.copied, each.passage.number))[:EXAMPLES]
    checkpoint = loaded.checkpoint
    facts |= {"checkpoint": str(checkpoint.folder)}
    if asked.as_json:
        own = {name: asdict(each) for name, each in figures.items()}
        settings = {"prompt_tokens": lengths[0], "tokens": lengths[1], "seed": asked.seed}
        examples = [_line("", each, tokenizer) for each in shown]
        value = {**facts, "step": checkpoint.step, **settings, **own, "examples": examples}
        console.write(to_json(value) + "\n")
    else:
        _print_table(f"{checkpoint.folder}: {_title(lengths)}", figures, console)
        for each in (one for one in shown if one.copied):
            line = _line("", each, tokenizer)
            texts = {name: _short(str(line[name])) for name in ("prompt", "expected", "output")}
            console.facts(f"{each.copied:,} tokens copied, at {each.passage.place:,}", texts)
    lines = [_line(name, each, tokenizer) for name, rows in found.items() for each in rows]
    on_root(comm, lambda: write_new_file(asked.outputs, to_json_lines(lines), "--outputs"))


def _title(lengths: tuple[int, int]) -> str:
    return (
        f"after {lengths[0]:,} tokens of a text the next {lengths[1]:,}, greedy, with 95% intervals"
    )


def _print_table(title: str, figures: Mapping[str, Memorisation], console: Console) -> None:
    def bounds(interval: tuple[float, float] | None, form: str) -> str:
        return f" ({interval[0]:{form}}–{interval[1]:{form}})" if interval else ""

    columns = list(figures.values())
    rows = [
        ["passages", *(f"{each.n:,}" for each in columns)],
        [
            "written again whole",
            *(f"{c.whole_share:.2%}{bounds(c.whole_interval, '.2%')}" for c in columns),
        ],
        [
            "tokens copied, mean",
            *(f"{c.mean_copied:,.2f}{bounds(c.mean_interval, ',.2f')}" for c in columns),
        ],
        ["tokens copied, median", *(f"{each.median_copied:g}" for each in columns)],
        ["tokens copied, longest", *(f"{each.longest:,}" for each in columns)],
    ]
    console.table(title, ["", *figures], rows)


def _load_data(loaded: Loaded, data: Path | None, comm: "MPI.Intracomm") -> Manifest:
    """Load the manifest of text, or of conversations, of the model's tokenizer."""

    def load() -> Manifest:
        manifest = load_data(loaded.checkpoint, data)
        check_tokenizer(manifest, loaded.tokenizer)
        if isinstance(manifest, PairManifest) and not PAIR_KINDS[manifest.pairs.kind].is_chat:
            raise MismatchError(
                f"memorisation is of text or conversations, and {manifest.folder} holds pairs of "
                f"the task {manifest.pairs.kind}; name others with --data, or a file with --texts"
            )
        return manifest

    return on_root(comm, load)


def _sample(
    manifest: Manifest, asked: MemorisationSettings, lengths: tuple[int, int]
) -> dict[str, list[Passage]]:
    """Draw passages of the training split, and of the validation split where it has some."""
    found = {}
    for split in ("train", "validation"):
        if split == "validation" and not manifest.splits[split].n_tokens:
            continue
        with open_of(manifest, split) as reader:
            try:
                found[split] = sample_passages(reader, asked.passages, lengths, asked.seed)
            except DataError:
                # A small validation split is a reference less, and no failure.
                if split == "train":
                    raise
    return found


def _read_texts(path: Path, tokenizer: Tokenizer, lengths: tuple[int, int]) -> list[Passage]:
    """Read a text a line, each with a prompt and one token more at least. Raises UsageError."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as failure:
        why = explain(failure, path) if isinstance(failure, OSError) else f"{path} is no UTF-8"
        raise UsageError(f"--texts: {why}; name a file of texts, a line each") from failure
    texts = [(number, text) for number, text in enumerate(lines, 1) if text.strip()]
    rows = [(number, list(tokenizer.encode(text))) for number, text in texts]
    if not rows:
        raise UsageError(f"--texts {path} has no text; write one in each line")
    for number, ids in rows:
        if len(ids) <= lengths[0]:
            raise UsageError(
                f"line {number:,} of --texts {path} has {len(ids):,} tokens, and a prompt takes "
                f"{lengths[0]:,} of them; lower --prompt-tokens, or write a longer text"
            )
    return cut_passages(rows, lengths)


def _line(split: str, each: Reproduction, tokenizer: Tokenizer) -> dict[str, object]:
    passage = each.passage
    return {
        **({"split": split} if split else {}),
        "number": passage.number,
        "place": passage.place,
        "prompt": tokenizer.decode(passage.prompt),
        "expected": tokenizer.decode(passage.expected),
        "output": tokenizer.decode(each.written),
        "copied": each.copied,
        "whole": each.whole,
    }


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"
