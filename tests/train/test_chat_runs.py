"""Instruction tuning: packed conversations train as those alone in their rows do, on any ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpillm.errors import RecipeError
from mpillm.infer.loading import load_trained
from mpillm.models.model_catalog import read_spec
from mpillm.system.console import Console
from mpillm.tasks.task_catalog import make_task
from mpillm.tokens.pairs.pair_manifest import PairManifest
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.train.recipe import parse_recipe
from mpillm.train.setup import train
from tests.tokens.pairs.test_chat_rows import conversations, made, shape

QUIET = Console(speaks=False)
CONTEXT = 256
MODEL = {"layers": 2, "width": 16, "heads": 2, "hidden": 32, "context": CONTEXT}
GPT2 = {"positions": "learned", "norm": "layernorm"}
CASES = {
    "rotary": {},
    "learned": GPT2,
    "windows": {"window": 16, "full_every": 2},
    "soft caps": {"attention_soft_cap": 20.0},
}


@pytest.fixture(scope="module")
def chats(shared_folder: Path, comm: MPI.Intracomm) -> Path:
    """200 conversations of 1 to 3 turns."""
    folder = shared_folder / "chats"
    if comm.rank == 0:
        made(folder, conversations(200))
    comm.Barrier()
    return folder / "out"


def loss_and_gradients(
    model: torch.nn.Module, reader: PairReader, packed: bool
) -> tuple[float, dict[str, torch.Tensor], int]:
    """The mean loss of all conversations, its gradients, and in how many rows they were."""
    task = make_task("chat")
    steps = reader.steps(shape(CONTEXT, packed), 8, 1)
    rows = len(steps.packing)
    # An epoch: its last step has fewer rows.
    parts = [
        task.fields(steps.raw(step, 0, min(8, rows - 8 * step))) for step in range(-(-rows // 8))
    ]
    weight = sum(task.weight(part) for part in parts)
    model.zero_grad()
    total = 0.0
    for part in parts:
        loss = task.loss_sum(model.forward_part(part, ()).outputs, part) / weight
        loss.backward()
        total += loss.item()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters()}
    return total, gradients, rows


@pytest.mark.parametrize("case", CASES)
def test_packed_conversations_have_the_loss_and_the_gradients_of_unpacked_ones(
    case: str, chats: Path, comm: MPI.Intracomm
) -> None:
    if comm.size > 1:
        pytest.skip("each rank would compute the same")
    manifest = PairManifest.load(chats)
    assert isinstance(manifest, PairManifest)
    torch.manual_seed(3)
    model = read_spec({**MODEL, **CASES[case], "vocab_size": manifest.vocab_size}).build()
    with PairReader(manifest, "train") as reader:
        alone, expected, rows = loss_and_gradients(model, reader, packed=False)
        packed, found, fewer = loss_and_gradients(model, reader, packed=True)
    assert rows == 200
    assert fewer < 0.6 * rows
    assert packed == pytest.approx(alone, rel=1e-5)
    for name, gradient in expected.items():
        largest = gradient.abs().max()
        assert (found[name] - gradient).abs().max() <= 1e-5 * largest, name


def run(chats: Path, folder: Path, comm: MPI.Intracomm, **more: Any) -> list[float]:
    table: dict[str, Any] = {
        "model": {**MODEL, **more.get("model", {})},
        "task": {"name": "chat"},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 1},
        "data": {"path": str(chats), **more.get("data", {})},
        "train": {"run": str(folder), "steps": 3, "batch": 12, "microbatch": 1, "sinks": []},
        "parallel": more.get("parallel", {}),
    }
    train(
        parse_recipe({**table, "train": {**table["train"], **more.get("train", {})}}, "r"),
        comm,
        QUIET,
    )
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("data", [{}, {"pack": False}], ids=["packed", "unpacked"])
def test_unequal_ranks_take_the_mean_over_all_learnt_tokens(
    data: dict[str, Any], chats: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    """Each rank has other rows, and each row other numbers of tokens that count."""
    if comm.rank == 0:
        run(chats, folder / "alone", MPI.COMM_SELF, data=data)
    comm.Barrier()
    found = run(chats, folder / "together", comm, data=data)
    lines = map(json.loads, (folder / "alone/metrics.jsonl").read_text().splitlines())
    expected = [line["loss"] for line in lines if "loss" in line]
    assert found == pytest.approx(expected, rel=1e-5)
    loaded = load_trained(folder / "together", comm, QUIET)
    assert "<|im_start|>" in loaded.checkpoint.text("chat_template.jinja")
    assert loaded.checkpoint.facts["special_tokens"]["eos_token"] == "</s>"
    assert loaded.tokenizer.end_of_text == "<|im_end|>"


@pytest.mark.parametrize("axis", ["context", "tensor", "pipeline"])
def test_the_losses_are_the_same_along_each_axis(
    axis: str, chats: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    if comm.size != 2:
        pytest.skip("two layers and two heads are shared by 2 ranks")
    # Learned positions: a conversation's own, whichever rank has them.
    if comm.rank == 0:
        run(chats, folder / "alone", MPI.COMM_SELF, model=GPT2)
    comm.Barrier()
    found = run(chats, folder / "together", comm, model=GPT2, parallel={axis: comm.size})
    lines = map(json.loads, (folder / "alone/metrics.jsonl").read_text().splitlines())
    assert found == pytest.approx([line["loss"] for line in lines if "loss" in line], rel=1e-5)


def test_packing_and_compiling_exclude_each_other(
    chats: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    with pytest.raises(RecipeError, match=r"data\.pack = true cuts .*; set data\.pack = false"):
        run(chats, folder / "run", comm, train={"compile": True})


def test_the_positions_of_a_document_begin_with_it() -> None:
    from mpillm.models.layers.document_spans import DocumentSpans

    spans = DocumentSpans(torch.tensor([[0, 0, 0, 1, 1, 2], [4, 4, 4, 4, 4, 4]]))
    assert spans.places.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert np.array(spans.lengths).sum() == 12
