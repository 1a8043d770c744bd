"""Write a trained model as a GGUF file, which llama.cpp reads: the work of `export --to gguf`."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import CheckpointError, RecipeError, UsageError
from mpillm.infer.loading import TOKENIZER
from mpillm.models.decoder import DecoderConfig
from mpillm.models.families.family import OF_TRAINING, Family
from mpillm.models.families.family_catalog import find_family
from mpillm.models.layers.stored.stored_codes import stored_format
from mpillm.models.spec import ModelSpec
from mpillm.system.atomic import flush, give_name, make_folder, temporary_path
from mpillm.system.console import Console, Progress
from mpillm.system.extras import require_packages
from mpillm.system.hdf5 import write_at
from mpillm.system.json_text import from_json
from mpillm.system.messages import explain
from mpillm.tokens.gguf.gguf_tokenizer import PREFIX, GgufVocabulary
from mpillm.tokens.gguf.gguf_vocabulary import gguf_vocabulary
from mpillm.tokens.tokenizer import Tokenizer
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.gguf_architectures import ARCHITECTURES, GgufArchitecture
from mpillm.weights.gguf_source import SUFFIX
from mpillm.weights.gguf_writing import FILE_TYPES, PlacedTensor, begin_gguf, stored_values
from mpillm.weights.saving import assign_writers

if TYPE_CHECKING:
    from mpi4py import MPI

# Of a vocabulary, by GGUF's names.
ROWS = ("token_embd.weight", "output.weight")
TEMPLATE = "chat_template.jinja"
_ELSEWHERE = "export with --to hf, and convert the folder with llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class GgufPlan:
    """What is written: tensors by GGUF's names, and the metadata."""

    architecture: GgufArchitecture
    config: Mapping[str, Any]
    theirs: Mapping[str, str]
    """GGUF's name of each tensor → that of Hugging Face."""
    shapes: Mapping[str, tuple[int, ...]]
    facts: Mapping[str, Any]
    finer: tuple[str, ...] = ()
    """Tensors with more bits than others: those that a compressed model has in int8."""

    @classmethod
    def make(
        cls,
        checkpoint: Checkpoint,
        family: Family,
        spec: ModelSpec,
        dtype: str,
    ) -> "GgufPlan":
        """Plan the file of a checkpoint, whose model is one of the family.

        Raises RecipeError where llama.cpp has no such model, DataError for such a tokenizer.
        """
        config, tensors = family.config(spec), family.tensors(spec)
        architecture = _architecture(config["model_type"])
        settings = architecture.metadata(config)
        _check_read_back(architecture, settings, spec, bool(config["tie_word_embeddings"]))
        theirs = {architecture.stored(name): name for name in tensors}
        shapes = {
            ours: tensors[name][::-1] if architecture.is_transposed(ours) else tensors[name]
            for ours, name in theirs.items()
        }
        facts = {
            "general.architecture": architecture.name,
            "general.type": "model",
            "general.name": checkpoint.folder.parent.parent.name or "model",
            "general.file_type": FILE_TYPES[dtype][1],
            "general.quantization_version": 2,
            **settings,
            **_tokenizer(checkpoint, int(config["vocab_size"])),
        }
        stored = stored_format(checkpoint.facts) is not None
        return cls(architecture, config, theirs, shapes, facts, ROWS if stored else ())


def _architecture(kind: str) -> GgufArchitecture:
    found = next((each for each in ARCHITECTURES.values() if kind in each.model_types), None)
    if found is None:
        known = [name for each in ARCHITECTURES.values() for name in each.model_types]
        raise RecipeError(
            f"a model of the family {kind} is not written as GGUF; {', '.join(known)} are; "
            f"{_ELSEWHERE}"
        )
    return found


def _check_read_back(
    architecture: GgufArchitecture, facts: Mapping[str, Any], spec: ModelSpec, tied: bool
) -> None:
    """Raise RecipeError where the metadata have no place for a setting of the model."""
    config = architecture.config(facts, spec.vocab_size, tied)
    read = find_family(config).spec(config)
    assert isinstance(spec, DecoderConfig)
    assert isinstance(read, DecoderConfig)
    other, wanted = read.resolved(), spec.resolved()
    for name in (each.name for each in fields(wanted) if each.name not in OF_TRAINING):
        theirs, ours = getattr(other, name), getattr(wanted, name)
        # Stored in float32.
        near = isinstance(ours, float) and math.isclose(ours, theirs, rel_tol=1e-6)
        if theirs != ours and not near:
            raise RecipeError(
                f"a model with {name} = {ours!r} is not written as GGUF, for a file of the "
                f"architecture {architecture.name} means {theirs!r} there; {_ELSEWHERE}"
            )


def _tokenizer(checkpoint: Checkpoint, rows: int) -> dict[str, Any]:
    text, facts = checkpoint.text(TOKENIZER), checkpoint.facts["tokenizer"]
    ours = Tokenizer.from_json(text, facts["name"], facts["end_of_text"])
    vocabulary = gguf_vocabulary(text, rows)
    config = _kept(checkpoint, "config.json")
    special = {"eos": ours.eot_id, "bos": vocabulary.first, "padding": None}
    for ours_key, theirs in (("bos", "bos"), ("padding", "pad")):
        number = config.get(f"{theirs}_token_id")
        if special[ours_key] is None and isinstance(number, int) and 0 <= number < rows:
            special[ours_key] = number
    if special["bos"] is None:
        # As GPT-2 has it. llama.cpp would take the token 11.
        special["bos"] = ours.eot_id
    found = _metadata(vocabulary)
    found |= {
        f"{PREFIX}{k}_token_id": number for k, number in special.items() if number is not None
    }
    template = _chat_template(checkpoint)
    return {**found, **({"tokenizer.chat_template": template} if template else {})}


def _chat_template(checkpoint: Checkpoint) -> str:
    """Return the text of the chat template, which nothing here runs; "" where there is none."""
    if TEMPLATE in checkpoint.texts:
        return checkpoint.text(TEMPLATE)
    found = _kept(checkpoint, "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else ""


def _kept(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return a JSON object that was imported; empty where there is none."""
    try:
        found = from_json(checkpoint.text(name)) if name in checkpoint.texts else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _metadata(vocabulary: GgufVocabulary) -> dict[str, Any]:
    """Return what the file has of the vocabulary, without what is empty."""
    found = {
        "model": vocabulary.kind,
        "pre": vocabulary.rule,
        "tokens": vocabulary.tokens,
        "token_type": vocabulary.types,
        "merges": vocabulary.merges,
        "scores": vocabulary.scores,
        "precompiled_charsmap": vocabulary.charsmap,
        "unknown_token_id": vocabulary.unknown,
    }
    found = {key: value for key, value in found.items() if value not in (None, [], (), b"")}
    found["add_bos_token"] = vocabulary.first is not None
    if vocabulary.scores:
        found["add_space_prefix"] = vocabulary.space_first
        found["remove_extra_whitespaces"] = vocabulary.collapses
    return {PREFIX + key: value for key, value in found.items()}


def export_gguf(
    out: Path,
    plan: GgufPlan,
    make: Callable[[str], Tensor],
    dtype: str,
    comm: "MPI.Intracomm",
    console: Console,
) -> int:
    """Write the file `out`, and return its bytes. Every rank calls it, and writes a share.

    `make(name)`: a tensor by the name of Hugging Face. Raises CheckpointError on every rank where
    any fails; then there is no file.
    """
    work, placed = on_root(comm, lambda: _begin(out, plan, dtype))
    try:
        sizes = {name: place.nbytes for name, place in placed.items()}
        own = assign_writers([sizes] * comm.size)[comm.rank]
        with console.progress("write", sum(sizes[name] for name in own), "bytes") as progress:
            on_all(comm, lambda: _write(work, plan, make, {n: placed[n] for n in own}, progress))
        on_root(comm, lambda: give_name(work, out))
    except BaseException:
        if comm.rank == 0:
            with suppress(OSError):
                work.unlink()
        raise
    last = max(placed.values(), key=lambda place: place.offset)
    return last.offset + last.nbytes


def check_gguf_name(out: Path) -> None:
    """Raise UsageError where a GGUF file would have another suffix, by which it is known."""
    require_packages("mpillm export --to gguf", "gguf")
    if out.suffix != SUFFIX:
        raise UsageError(f"--out is {out}, and the name of a GGUF file ends in {SUFFIX}")


def _begin(out: Path, plan: GgufPlan, dtype: str) -> tuple[Path, dict[str, PlacedTensor]]:
    work = temporary_path(out)
    try:
        make_folder(out.parent)
        return work, begin_gguf(work, plan.facts, plan.shapes, dtype, plan.finer)
    except OSError as failure:
        with suppress(OSError):
            work.unlink()
        raise CheckpointError(f"cannot write {out}: {explain(failure, work)}") from failure


def _write(
    work: Path,
    plan: GgufPlan,
    make: Callable[[str], Tensor],
    placed: Mapping[str, PlacedTensor],
    progress: Progress,
) -> None:
    try:
        with work.open("r+b", buffering=0) as file:
            for name, place in placed.items():
                values = plan.architecture.to_stored(name, make(plan.theirs[name]), plan.config)
                write_at(file.fileno(), stored_values(name, values, place.kind), place.offset)
                progress.advance(place.nbytes)
        flush(work)
    except OSError as failure:
        raise CheckpointError(
            f"cannot write {work.name}: {explain(failure, work)}; free some space"
        ) from failure
