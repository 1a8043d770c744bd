"""Make a compressed checkpoint of a trained model: the work of `mpillm compress`."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import DataError, MismatchError
from mpillm.infer.compress.calibration_rows import ModelFigures, measure_model, read_rows
from mpillm.infer.compress.compress_blocks import (
    check_layers,
    compress_blocks,
    compressible,
)
from mpillm.infer.compress.compression_method import CompressionMethod, CompressionOptions
from mpillm.infer.compress.method_catalog import make_method
from mpillm.infer.compress.stored_model import OTHERS
from mpillm.infer.import_model import refuse_full
from mpillm.infer.loading import Loaded, load_data, load_trained
from mpillm.infer.model_source import BASE
from mpillm.models.layers.stored.stored_codes import BYTES, COMPRESSED, Grid, StoredCodes
from mpillm.models.part_module import Fields, PartModule, torch_explained
from mpillm.system.atomic import make_folder
from mpillm.system.console import Console
from mpillm.tokens.manifest import Manifest, check_tokenizer
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.names import stored_name, weight_name
from mpillm.weights.places import CHECKPOINTS
from mpillm.weights.saving import save

if TYPE_CHECKING:
    from mpi4py import MPI


# Weights of a vocabulary: next to layers of 4 bits they would be most of a small model.
ROWS = ("embedding.weight", "head.weight")


@dataclass(frozen=True)
class CompressionRequest:
    """What is compressed, how, and on which data."""

    trained: Path
    out: Path
    method: str
    options: CompressionOptions = field(default_factory=CompressionOptions)
    data: Path | None = None
    """None: the dataset that the run was trained on, where the method or the figures need one."""
    rows: int = 64
    """Of the training split, for calibration."""
    held_out: int = 32
    """Rows of the validation split, for the figures."""


@dataclass(frozen=True)
class CompressedModel:
    """What `compress_model` has made."""

    checkpoint: Path
    before: ModelFigures
    after: ModelFigures
    stored: int
    """The weights that are stored as codes."""
    zeros: int
    """Zeros among the weights of the linear layers of blocks."""
    weights: int
    """All of these weights."""


def compress_model(
    request: CompressionRequest, comm: "MPI.Intracomm", console: Console
) -> CompressedModel:
    """Compress the model of a run or a checkpoint; write it as a checkpoint of the folder `out`.

    Every rank of `comm` calls it, and solves a share of the layers. Raises UsageError where `out`
    holds anything or a layer does not fit the method. Raises MismatchError for a model that is
    compressed already, and DataError where a method has no data.
    """
    method = make_method(request.method, request.options)
    on_root(comm, lambda: refuse_full(request.out))
    loaded = load_trained(request.trained, comm, console)
    check_compressible(loaded, method)
    manifest = on_root(comm, lambda: _data(request, loaded, method))
    with torch_explained():
        given = loaded.task, loaded.model.spec
        training: list[Fields] = []
        held_out: list[Fields] = []
        if manifest is not None:
            held_out = read_rows(manifest, "validation", *given, request.held_out, comm)
            if method.needs_data:
                training = read_rows(manifest, "train", *given, request.rows, comm)
        nbytes = _bytes_of(loaded.checkpoint)
        before = measure_model(loaded.model, loaded.task, held_out, nbytes, comm, console)
        kept = compress_blocks(loaded.model, method, training, comm, console)
        tensors = on_all(comm, lambda: _tensors(loaded.model, kept))
        zeros, weights = _zeros(loaded.model)
        saved = _save(request, loaded, method, tensors, comm)
        made = load_trained(saved, comm, console)
        nbytes = _bytes_of(made.checkpoint)
        after = measure_model(made.model, made.task, held_out, nbytes, comm, console)
    stored = sum(each.shape[0] * each.shape[1] for each in kept.values())
    return CompressedModel(saved, before, after, stored, zeros, weights)


def check_compressible(loaded: Loaded, method: CompressionMethod) -> None:
    """Raise MismatchError where a model is compressed already, or the method is not for it."""
    folder, spec = loaded.checkpoint.folder, loaded.model.spec
    fact = loaded.checkpoint.facts.get(COMPRESSED)
    if isinstance(fact, dict) and fact.get("format") is not None:
        raise MismatchError(
            f"{folder} is compressed already, by {fact.get('method')}; compress the model that it "
            "was made of"
        )
    if not compressible(loaded.model):
        raise MismatchError(
            f"the model of {folder} is a {spec.architecture} without linear layers in blocks, "
            "which compression is for; leave it as it is"
        )
    if method.needs_data and spec.source_field:
        raise MismatchError(
            f"--method {method.name} follows one stream from block to block, and an encoder-"
            "decoder has two; take rtn-int8, rtn-int4 or magnitude, which read no data"
        )
    check_layers(loaded.model, method)


def _data(
    request: CompressionRequest, loaded: Loaded, method: CompressionMethod
) -> Manifest | None:
    """Return the dataset; None where none is needed or there. Raises DataError, MismatchError."""
    try:
        manifest = load_data(loaded.checkpoint, request.data)
    except DataError as failure:
        if request.data is None and not method.needs_data:
            return None
        if request.data is None:
            raise DataError(
                f"--method {method.name} reads calibration data, and there is none: {failure}"
            ) from failure
        raise
    check_tokenizer(manifest, loaded.tokenizer)
    return manifest


def _bytes_of(checkpoint: Checkpoint) -> int:
    """Return the bytes of a checkpoint's weights, without an optimizer's state."""
    return sum(
        piece.nbytes
        for name, entry in checkpoint.tensors.items()
        if not name.startswith("optimizer/")
        for piece in entry.pieces
    )


def _tensors(model: PartModule, kept: Mapping[str, StoredCodes]) -> dict[str, Tensor]:
    """Return the tensors of the checkpoint by name."""
    found: dict[str, Tensor] = {}
    for name, weight in model.named_weights():
        stored = kept.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if kept and name in ROWS and weight.dim() == 2:
            grid = Grid.of(weight.detach(), BYTES)
            stored = grid.store(grid.codes(weight.detach()))
        if stored is not None:
            for part, tensor in stored.tensors.items():
                found[stored_name(name, part)] = tensor
        else:
            dtype = getattr(torch, OTHERS) if kept else torch.float32
            found[weight_name(name)] = weight.detach().to(dtype)
    return found


def _zeros(model: PartModule) -> tuple[int, int]:
    """Count the zeros of the layers of blocks, and all of their weights."""
    layers = list(compressible(model).values())
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    return zeros, sum(layer.weight.numel() for layer in layers)


def _save(
    request: CompressionRequest,
    loaded: Loaded,
    method: CompressionMethod,
    tensors: Mapping[str, Tensor],
    comm: "MPI.Intracomm",
) -> Path:
    checkpoint = loaded.checkpoint
    layout = method.format
    recipe = dict(checkpoint.facts["recipe"])
    # Adapters are merged, and no run is named by the folder.
    recipe.pop("adapter", None)
    recipe["train"] = {
        name: value for name, value in recipe["train"].items() if name not in ("run", "freeze")
    }
    recipe["model"] = asdict(method.reshape(loaded.model.spec))  # type: ignore[call-overload]
    facts: dict[str, Any] = {
        **{key: value for key, value in checkpoint.facts.items() if key != BASE},
        "recipe": recipe,
        COMPRESSED: {
            "method": method.name,
            "of": str(checkpoint.folder),
            "options": asdict(method.options),
            "format": None if layout is None else layout.to_facts(),
        },
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    texts = on_root(comm, lambda: {name: checkpoint.text(name) for name in checkpoint.texts})
    on_root(comm, lambda: make_folder(request.out))
    return save(request.out / CHECKPOINTS, tensors, facts, texts, comm)
