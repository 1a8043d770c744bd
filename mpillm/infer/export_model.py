"""Write a trained model as other tools read it: the work of `mpillm export`."""

import math
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import CheckpointError, RecipeError, UsageError
from mpillm.infer.compress.export_packed import PackedPlan
from mpillm.infer.export_gguf import GgufPlan, check_gguf_name, export_gguf
from mpillm.infer.export_peft import check_adapter, write_adapter
from mpillm.infer.generate import first_token
from mpillm.infer.imported_task import with_labels
from mpillm.infer.loading import TOKENIZER, check_trained
from mpillm.infer.model_source import ModelSource, open_model
from mpillm.infer.write_tensors import write_tensors
from mpillm.models.families.family import Family
from mpillm.models.families.family_catalog import family_of, find_family
from mpillm.models.model_catalog import read_spec
from mpillm.models.spec import ModelSpec
from mpillm.system.atomic import flush, give_name, make_folder, refuse_taken
from mpillm.system.console import Console, Progress, binary_bytes
from mpillm.system.extras import require_packages
from mpillm.system.json_text import from_json, to_json
from mpillm.system.messages import command, explain
from mpillm.tasks.task_catalog import read_settings
from mpillm.tokens.tokenizer import Tokenizer
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.finding import find
from mpillm.weights.gguf_source import SUFFIX
from mpillm.weights.index import ITEM_BYTES
from mpillm.weights.packed.packed_format import CONFIG_KEY
from mpillm.weights.published_model import their_tensors
from mpillm.weights.safetensors_source import INDEX, SINGLE

if TYPE_CHECKING:
    from mpi4py import MPI

# Of a file: below the limit of file systems and hubs that take 5 GB, and a rank's memory.
SHARD_BYTES = 4 << 30
CONFIG = "config.json"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class _Plan:
    """What is written: names with shapes, and how each tensor comes from our weights."""

    shapes: Mapping[str, tuple[int, ...]]
    make: Callable[[str], Tensor]
    texts: Mapping[str, str]
    sizes: Mapping[str, int]
    """The bytes of each tensor."""


@dataclass(frozen=True)
class ExportedModel:
    """What `export_model` has made."""

    out: Path
    files: int
    nbytes: int
    family: str
    """The model_type of the family, GGUF's architecture; "" for plain tensors under our names."""
    reader: str = ""
    """The class of transformers that reads it."""


def export_model(
    path: Path,
    out: Path,
    kind: str,
    dtype: str,
    comm: "MPI.Intracomm",
    console: Console,
) -> ExportedModel:
    """Write the model of a run or a checkpoint at `path` as `out`, a new folder or GGUF file.

    `kind`: `hf`, a folder that transformers loads, `safetensors`, our names, `gguf`, or `peft`, the
    adapters of a run alone; the others have them merged with their base. `compressed-tensors`: a
    folder with the codes of a compressed model. `dtype`: of the tensors,
    one of DTYPES or, of a GGUF file, of FILE_TYPES; `auto` is that of the model which was imported,
    else float32. Every rank of `comm` calls it and writes a share. Raises UsageError where `out`
    exists, RecipeError where no family is the model.
    """
    _check(out, kind, dtype)
    on_root(comm, lambda: refuse_taken(out))
    checkpoint = find(path, comm, console, check_trained)
    spec = read_spec(checkpoint.facts["recipe"]["model"])
    imported = checkpoint.facts.get("imported") or {}
    if dtype == "auto":
        known = str(imported.get("dtype"))
        dtype = known if known in DTYPES else "float32"
    family = None if kind == "safetensors" else _family(spec, str(imported.get("model_type")))
    if kind == "peft":
        assert family is not None
        return _as_adapter(checkpoint, spec, family, out, comm)
    if kind == "gguf":
        assert family is not None
        return _as_gguf(checkpoint, spec, family, out, dtype, comm, console)
    if kind == "compressed-tensors":
        assert family is not None
        plan = on_all(comm, lambda: _packed_plan(checkpoint, family, spec))
    else:
        source = open_model(CheckpointSource(checkpoint), comm, console)
        plan = on_all(comm, lambda: _plan(checkpoint, source, family, dtype))
    shards = _shards(plan.sizes)
    total = sum(sum(sizes.values()) for sizes in shards)
    work = on_root(comm, lambda: _begin(out, plan.texts))
    try:
        with console.progress("write", total, "bytes") as progress:
            on_all(comm, lambda: _write(work, shards, plan.make, comm.rank, comm.size, progress))
        on_root(comm, lambda: _finish(work, out, shards, total))
    except BaseException:
        if comm.rank == 0:
            with suppress(OSError):
                shutil.rmtree(work)
        raise
    if family is None:
        return ExportedModel(out, len(shards), total, "")
    reader = str(family.config(spec)["architectures"][0])
    return ExportedModel(out, len(shards), total, family.model_types[0], reader)


def _check(out: Path, kind: str, dtype: str) -> None:
    if kind == "gguf":
        return check_gguf_name(out)
    require_packages("mpillm export", "safetensors")
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"--dtype {dtype} is of GGUF files; take --to gguf, or another dtype")
    if kind == "compressed-tensors" and dtype != "auto":
        raise UsageError(f"--to {kind} writes codes and bfloat16; leave --dtype {dtype} out")
    if kind == "peft" and dtype not in ("auto", "float32"):
        raise UsageError(f"--to peft writes adapters in float32; leave --dtype {dtype} out")
    return None


def _as_gguf(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    family: Family,
    out: Path,
    dtype: str,
    comm: "MPI.Intracomm",
    console: Console,
) -> ExportedModel:
    source = open_model(CheckpointSource(checkpoint), comm, console)
    plan = on_all(comm, lambda: GgufPlan.make(checkpoint, family, spec, dtype))
    make = their_tensors(family, spec, source.read)
    nbytes = export_gguf(out, plan, make, dtype, comm, console)
    return ExportedModel(out, 1, nbytes, plan.architecture.name)


def _as_adapter(
    checkpoint: Checkpoint, spec: ModelSpec, family: Family, out: Path, comm: "MPI.Intracomm"
) -> ExportedModel:
    """Write the adapters alone, which are small: rank 0 does it."""

    def write() -> int:
        check_adapter(checkpoint)
        work = _begin(out, {})
        try:
            nbytes = write_adapter(checkpoint, spec, family, work)
            flush(work)
            give_name(work, out)
        except BaseException:
            with suppress(OSError):
                shutil.rmtree(work)
            raise
        return nbytes

    return ExportedModel(out, 1, on_root(comm, write), "adapters of PEFT")


def print_export(made: ExportedModel, console: Console) -> None:
    """Print what was written, and how it is read."""
    files = f"{made.files} file{'s' if made.files > 1 else ''}, {binary_bytes(made.nbytes)}"
    console.say(f"{made.out}: {made.family or 'tensors under our names'}, {files}")
    if made.out.suffix == SUFFIX:
        console.say(f"next, with llama.cpp: {command(['llama-server', '--model', made.out])}")
    elif made.reader:
        console.say(
            f"next, in Python: transformers.{made.reader}.from_pretrained({str(made.out)!r})"
        )


def _family(spec: ModelSpec, known: str) -> Family:
    """Return the family that the model was imported as, while it still is one of it."""
    with suppress(RecipeError):
        family = find_family({"model_type": known})
        family.config(spec)
        return family
    return family_of(spec)


def _plan(checkpoint: Checkpoint, source: ModelSource, family: Family | None, dtype: str) -> _Plan:
    spec = source.spec

    def ours(name: str) -> Tensor:
        return source.read(name).to(getattr(torch, dtype))

    if family is None:
        texts = {"recipe.json": to_json(checkpoint.facts["recipe"], indent=1) + "\n"}
        return _Plan(source.shapes, ours, texts, _bytes_of(source.shapes, dtype))
    texts, shapes = _texts(checkpoint, spec, family, dtype), family.tensors(spec)
    return _Plan(shapes, their_tensors(family, spec, ours), texts, _bytes_of(shapes, dtype))


def _packed_plan(checkpoint: Checkpoint, family: Family, spec: ModelSpec) -> _Plan:
    packed = PackedPlan.of(CheckpointSource(checkpoint), family, spec)
    texts = _texts(checkpoint, spec, family, "bfloat16")
    config = from_json(texts[CONFIG]) | packed.config
    texts[CONFIG] = to_json(config, indent=1) + "\n"
    return _Plan(packed.shapes, packed.make, texts, packed.sizes)


def _bytes_of(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, int]:
    return {name: ITEM_BYTES[dtype] * math.prod(shape) for name, shape in shapes.items()}


def _texts(checkpoint: Checkpoint, spec: ModelSpec, family: Family, dtype: str) -> dict[str, str]:
    """Return the small files of a folder: those that were imported, and what they lack."""
    facts = checkpoint.facts["tokenizer"]
    text = checkpoint.text(TOKENIZER)
    tokenizer = Tokenizer.from_json(text, facts["name"], facts["end_of_text"])
    kept = {name: checkpoint.text(name) for name in checkpoint.texts if name != TOKENIZER}
    config = from_json(kept.get(CONFIG, "{}"))
    # Of a folder that was imported: its codes are plain values now.
    config.pop(CONFIG_KEY, None)
    end = tokenizer.eot_id
    config = with_labels(config | {"eos_token_id": end}, family.config(spec), checkpoint.facts)
    if spec.source_field:
        # transformers' own defaults are ids of the published vocabularies.
        task = read_settings(checkpoint.facts["recipe"].get("task", {}))
        start = first_token(spec, tokenizer.vocabulary, task)
        config |= {"decoder_start_token_id": start}
        config = {"pad_token_id": start, "bos_token_id": end, **config}
    # transformers 5 reads `dtype`, and 4 `torch_dtype`.
    config |= {"dtype": dtype, "torch_dtype": dtype}
    made = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.end_of_text,
            "model_max_length": spec.context,
            "clean_up_tokenization_spaces": False,
            # Those that the chat template of the data may write.
            **checkpoint.facts.get("special_tokens", {}),
        }
    }
    texts = {name: to_json(value, indent=1) + "\n" for name, value in made.items()}
    return {**texts, **kept, TOKENIZER: text, CONFIG: to_json(config, indent=1) + "\n"}


def _shards(sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Share the tensors among files in their order: name → bytes of each."""
    shards: list[dict[str, int]] = [{}]
    filled = 0
    for name, nbytes in sizes.items():
        if shards[-1] and filled + nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = nbytes
        filled += nbytes
    return shards


def _begin(out: Path, texts: Mapping[str, str]) -> Path:
    """Make a folder with a name that nobody can predict, with the small files."""
    work = out.with_name(f".{out.name[:40]}.{secrets.token_hex(8)}.export")
    try:
        make_folder(out.parent)
        work.mkdir()
        for name, text in texts.items():
            (work / name).write_text(text, encoding="utf-8")
    except OSError as failure:
        with suppress(OSError):
            shutil.rmtree(work)
        raise CheckpointError(f"cannot write {out}: {explain(failure, work)}") from failure
    return work


def _write(
    work: Path,
    shards: Sequence[Mapping[str, int]],
    make: Callable[[str], Tensor],
    rank: int,
    ranks: int,
    progress: Progress,
) -> None:
    """Write this rank's files, one after the other."""
    for number in range(rank, len(shards), ranks):
        tensors: dict[str, Tensor] = {}
        for name, nbytes in shards[number].items():
            tensors[name] = make(name).contiguous()
            progress.advance(nbytes)
        write_tensors(work / _file(number, len(shards)), tensors, next(work.glob("*.json")))


def _file(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _finish(work: Path, out: Path, shards: Sequence[Mapping[str, int]], total: int) -> None:
    """Write the index of several files, and give the folder its name."""
    if len(shards) > 1:
        index: dict[str, Any] = {
            "metadata": {"total_size": total},
            "weight_map": {
                name: _file(number, len(shards))
                for number, sizes in enumerate(shards)
                for name in sizes
            },
        }
        (work / INDEX).write_text(to_json(index, indent=1) + "\n", encoding="utf-8")
    flush(work)
    give_name(work, out)
