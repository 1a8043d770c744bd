"""Check that a task, its data and its model fit each other, before anything is computed."""

from mpillm.errors import MismatchError
from mpillm.models.spec import ModelSpec
from mpillm.tasks.task import Task
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.pairs.pair_manifest import PairManifest

# What a task learns of each row → the kind of a model that gives as many numbers of it.
OF_ROWS = dict.fromkeys(
    ("a number of each row", "a set of classes of each row"), "a class of each row"
)


def check_task(task: Task, spec: ModelSpec, manifest: Manifest) -> None:
    """Raise MismatchError unless the data is of the task, and the model reads it and learns it."""
    _check_kind(task, manifest)
    _check_output(task, spec)
    if isinstance(manifest, PairManifest) and spec.input_field:
        _check_input(spec, manifest)


def _check_kind(task: Task, manifest: Manifest) -> None:
    kind = manifest.pairs.kind if isinstance(manifest, PairManifest) else ""
    known = task.pair_kinds
    if kind in known or not (kind or known):
        return
    holds = f"pairs of the task {kind}" if kind else "the tokens of a text"
    needs = f"pairs: --task {' or '.join(known)}" if known else "the tokens of a text"
    raise MismatchError(
        f"the data {manifest.folder} holds {holds}, and the task {task.name} learns from {needs}; "
        "prepare the data for the task, or take another task.name"
    )


def _check_output(task: Task, spec: ModelSpec) -> None:
    # A wrong model may compute all the same: an encoder sees the token that it is to predict.
    wanted = ("any", task.output_kind, OF_ROWS.get(task.output_kind))
    if task.output_kind != "any" and spec.output_kind not in wanted:
        raise MismatchError(
            f"the task {task.name} learns {task.output_kind}, and the model of the architecture "
            f"{spec.architecture} gives {spec.output_kind}; choose another task.name, model.shape "
            "or, of an encoder, model.head: docs/tasks.md has the model of each task"
        )
    classes = getattr(spec, "classes", 0)
    if task.output_kind == "a number of each row" and classes > 1:
        raise MismatchError(
            f"the task {task.name} learns one number of each row, and the model gives {classes:,}; "
            "set model.classes = 1, or begin a run from it with train.start_from"
        )


def _check_input(spec: ModelSpec, manifest: PairManifest) -> None:
    rows = manifest.prep.get("row_tokens", 0)
    if isinstance(rows, int) and rows > spec.context:
        raise MismatchError(
            f"the data {manifest.folder} has rows of {rows:,} tokens, and the model reads "
            f"{spec.context:,}; prepare it with --row-tokens {spec.context} and a lower "
            "--stride, or raise model.context"
        )
    form = manifest.pairs
    found, wanted = form.sides.source, spec.input_field
    # Tokens are the ids of an encoder, and the source of an encoder-decoder.
    if found == wanted or (found == "source" and wanted == "ids"):
        if form.item == spec.input_item:
            return
        keys = "channels and model.image_size" if found == "pixels" else "mels"
        raise MismatchError(
            f"the data {manifest.folder} has {found} of the shape {form.item}, and the model reads "
            f"{spec.input_item}; set model.{keys}, or prepare data of that shape"
        )
    names = {"pixels": "pictures", "frames": "sound"}
    raise MismatchError(
        f"the data {manifest.folder} holds {names.get(found, 'text')}, and the model reads "
        f"{names.get(wanted, 'text')}; set model.image_size for pictures or model.mels for sound, "
        "neither for text, or choose another model.shape"
    )
