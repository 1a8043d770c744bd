"""Make a checkpoint of a published model: the work of `mpillm import`."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import CheckpointError, DataError, MismatchError, UsageError
from mpillm.infer.import_peft import import_adapter, is_adapter
from mpillm.infer.imported_task import imported_task
from mpillm.infer.loading import TOKENIZER
from mpillm.models.spec import ModelSpec
from mpillm.system.atomic import make_folder
from mpillm.system.console import Console, Progress, binary_bytes
from mpillm.system.json_text import from_json, to_json
from mpillm.system.messages import command, explain
from mpillm.system.plain_files import LARGEST_FILE, read_plain
from mpillm.tokens.gguf.gguf_tokenizer import PREFIX, GgufVocabulary, gguf_tokenizer
from mpillm.tokens.manifest import tokenizer_facts
from mpillm.tokens.tokenizer import Tokenizer, byte_tokenizer
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.gguf_model import GgufModel
from mpillm.weights.gguf_source import GgufSource
from mpillm.weights.index import ITEM_BYTES
from mpillm.weights.model_settings import model_settings
from mpillm.weights.names import weight_name
from mpillm.weights.open_source import open_source
from mpillm.weights.peft_format import CONFIG as ADAPTER
from mpillm.weights.places import CHECKPOINTS
from mpillm.weights.published_model import PublishedModel
from mpillm.weights.saving import assign_writers, save
from mpillm.weights.tensor_source import TensorSource

if TYPE_CHECKING:
    from mpi4py import MPI

# Small files of a Hugging Face folder that a checkpoint keeps, for export to give them back.
KEPT = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class ImportedModel:
    """What `import_model` has made."""

    checkpoint: Path
    model: ModelSpec


def import_model(
    path: Path,
    out: Path,
    comm: "MPI.Intracomm",
    console: Console,
    end_of_text: str | None = None,
    base: Path | None = None,
) -> ImportedModel:
    """Write the model at `path` as step 0 of the folder `out`, in float32.

    `base`: of a folder of adapters, the model that they were trained on; None: the one they name.

    Every rank of `comm` calls it; each reads and writes a share of the weights. Raises
    CheckpointError where the model cannot be read, and UsageError where `out` holds anything.
    """
    on_root(comm, lambda: refuse_full(out))
    if on_root(comm, lambda: is_adapter(path)):
        saved = import_adapter(path, out, base, comm, console)
        return ImportedModel(saved, model_settings(saved))
    if base is not None:
        raise UsageError(f"--base is of adapters, and {path} has no {ADAPTER}; leave --base out")
    source = open_source(path, comm, console)
    model = on_all(comm, lambda: PublishedModel.open(as_published(source)))
    texts, facts = on_root(comm, lambda: texts_and_facts(source, model, end_of_text))
    tokenizer = facts["tokenizer"]
    # A model of pictures has no vocabulary.
    if tokenizer["vocab_size"] > model.spec.vocab_size and model.spec.vocab_size:
        raise MismatchError(
            f"{path} has a tokenizer of {tokenizer['vocab_size']:,} tokens and an embedding of "
            f"{model.spec.vocab_size:,}; take the tokenizer that belongs to the model"
        )
    itemsize = ITEM_BYTES["float32"]
    sizes = {name: itemsize * math.prod(shape) for name, shape in model.shapes.items()}
    own = assign_writers([sizes] * comm.size)[comm.rank]
    with console.progress("read", sum(sizes[name] for name in own), "bytes") as progress:
        tensors = on_all(comm, lambda: _read(model, own, sizes, progress))
    on_root(comm, lambda: make_folder(out))
    saved = save(out / CHECKPOINTS, tensors, facts, texts, comm)
    return ImportedModel(saved, model.spec)


def print_import(imported: ImportedModel, out: Path, console: Console) -> None:
    """Print what was made, and the command that uses it."""
    model = imported.model
    size = binary_bytes(ITEM_BYTES["float32"] * model.parameters)
    console.say(f"{imported.checkpoint}: {model.describe()}")
    console.say(f"{model.parameters:,} parameters, {size} in float32")
    if model.generates:
        console.say(f"next: {command(['mpillm', 'generate', out, '--prompt', 'TEXT'])}")
    else:
        console.say(f'next: train.start_from = "{out}" in a recipe, or export it')


def refuse_full(out: Path) -> None:
    """Raise UsageError where the folder `out` holds anything."""
    try:
        full = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as failure:
        raise UsageError(explain(failure, out)) from failure
    if full:
        raise UsageError(f"{out} is there already and not empty; name another --out")


def as_published(source: TensorSource) -> TensorSource:
    """Return a source with the names of a Hugging Face folder. Raises CheckpointError for a
    checkpoint of ours.
    """
    if isinstance(source, CheckpointSource):
        raise CheckpointError(
            f"{source.path} is a checkpoint of mpillm already; use it as it is, or begin a run "
            "with it by train.start_from"
        )
    return GgufModel(source) if isinstance(source, GgufSource) else source


def texts_and_facts(
    source: TensorSource, model: PublishedModel, end_of_text: str | None
) -> tuple[dict[str, str], dict[str, Any]]:
    """Read the small files of a folder, or make them of a GGUF file's metadata, and collect the
    facts of the checkpoint. Raises CheckpointError.
    """
    path = source.path
    try:
        if isinstance(source, GgufSource):
            texts = _texts_of_gguf(source)
        else:
            texts = _texts_of(path, reads_text=model.spec.vocab_size > 0)
        text = texts[TOKENIZER]
        end = end_of_text or _end_of_text(texts, text)
        tokenizer = Tokenizer.from_json(text, path.stem, end)
    except DataError as failure:
        raise CheckpointError(f"{path}: {failure}") from failure
    return texts, _facts(model, tokenizer, texts)


def _texts_of(path: Path, reads_text: bool) -> dict[str, str]:
    kept = {name: _text(path / name) for name in (*KEPT, TOKENIZER) if (path / name).exists()}
    if not reads_text:
        # That of all datasets of pictures.
        return {**kept, TOKENIZER: byte_tokenizer().to_json()}
    if TOKENIZER not in kept:
        raise CheckpointError(
            f"{path} has no {TOKENIZER}; make it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return kept


def _texts_of_gguf(source: GgufSource) -> dict[str, str]:
    def fact(name: str) -> Any:
        return source.facts.get(PREFIX + name)

    tokens, types, merges, scores, charsmap = (
        source.array(PREFIX + name)
        for name in ("tokens", "token_type", "merges", "scores", "precompiled_charsmap")
    )
    vocabulary = GgufVocabulary(
        str(fact("model")),
        str(fact("pre")),
        tokens,
        types,
        merges,
        scores,
        first=fact("bos_token_id") if fact("add_bos_token") else None,
        unknown=fact("unknown_token_id"),
        space_first=fact("add_space_prefix") is not False,
        collapses=bool(fact("remove_extra_whitespaces")),
        charsmap=charsmap,
    )
    special = {"eos_token_id": "eos", "bos_token_id": "bos", "pad_token_id": "padding"}
    config = {theirs: fact(f"{ours}_token_id") for theirs, ours in special.items()}
    config = {key: number for key, number in config.items() if number is not None}
    texts = {TOKENIZER: gguf_tokenizer(vocabulary), "config.json": to_json(config) + "\n"}
    template = source.facts.get("tokenizer.chat_template")
    return {**texts, "chat_template.jinja": template} if isinstance(template, str) else texts


def _end_of_text(texts: dict[str, str], tokenizer: str) -> str | None:
    """Return the text of the token that config.json names as the end, or of the one that separates
    texts; None where none is named.
    """
    try:
        config = from_json(texts.get("config.json", "{}"))
        number = config.get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        added = from_json(tokenizer).get("added_tokens", [])
        named = next((str(t["content"]) for t in added if t.get("id") == number), None)
        return named or _separator(texts, added)
    except (ValueError, AttributeError, TypeError, KeyError):
        return None


def _separator(texts: dict[str, str], added: list[Any]) -> str | None:
    """Return the token that separates texts, where a model such as BERT has no end of one."""
    special = from_json(texts.get("special_tokens_map.json", "{}"))
    if special.get("eos_token") is not None:
        return None
    token = special.get("sep_token")
    text = token.get("content") if isinstance(token, dict) else token
    return next((str(t["content"]) for t in added if t["content"] == text), None)


def _text(path: Path) -> str:
    try:
        return read_plain(path, most=LARGEST_FILE).decode("utf-8")
    except OSError as failure:
        raise CheckpointError(explain(failure, path)) from failure
    except UnicodeDecodeError as failure:
        raise CheckpointError(f"{path} is no UTF-8 text; download it again") from failure


def _read(
    model: PublishedModel, names: list[str], sizes: dict[str, int], progress: Progress
) -> dict[str, Tensor]:
    tensors = {}
    for name in names:
        tensors[weight_name(name)] = model.read(name).to(torch.float32)
        progress.advance(sizes[name])
    return tensors


def _facts(model: PublishedModel, tokenizer: Tokenizer, texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the facts of a run's checkpoint that a model without a run has."""
    task, no_task = imported_task(model.spec, tokenizer.vocabulary, texts)
    return {
        "step": 0,
        "tokens": 0,
        "seed": 0,
        "recipe": {
            "model": asdict(model.spec),  # type: ignore[call-overload]
            # There is none: `evaluate` asks for --data.
            "data": {"path": ""},
            "task": task,
            "optimizer": {},
            "train": {"seed": 0, "batch": 1},
        },
        "data": "",
        "tokenizer": tokenizer_facts(tokenizer),
        **({"classes": list(model.classes)} if model.classes else {}),
        "imported": {
            "from": str(model.source.path),
            "model_type": str(model.source.facts.get("model_type")),
            "dtype": model.dtype,
            **({"no_task": no_task} if no_task else {}),
        },
        "versions": {"torch": torch.__version__},
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
