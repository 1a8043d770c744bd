"""Whole runs on GPUs, compared with those of the CPU; ranks share a GPU where there are fewer."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpillm.infer.print_evaluation import print_evaluation
from mpillm.infer.print_generation import print_generation
from mpillm.infer.sampling import Sampling
from mpillm.machine.node_map import NodeMap
from mpillm.system.console import Console
from mpillm.train.hardware import choose_dtype
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train
from mpillm.weights.finding import find
from mpillm.weights.places import CHECKPOINTS

QUIET = Console(speaks=False)
STEPS = 12
pytestmark = pytest.mark.gpu


def recipe(dataset: Path, run: Path, device: torch.device | str, /, **sections: object) -> Recipe:
    kind = device if isinstance(device, str) else device.type
    table: dict[str, dict[str, object]] = {
        "model": {"layers": 4, "width": 64, "heads": 4, "kv_heads": 2, "context": 64},
        "data": {"path": str(dataset)},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
        "train": {
            "run": str(run),
            "steps": STEPS,
            "batch": 12,
            "microbatch": 1,
            "device": kind,
            "share_gpu": True,
            "dtype": "float32",
        },
    }
    for name, section in sections.items():
        assert isinstance(section, dict)
        table[name] = {**table.get(name, {}), **section}
    return parse_recipe(table, "test")


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def hashes(run: Path, comm: MPI.Intracomm) -> dict[str, list[str]]:
    found = find(run, comm, QUIET).tensors
    return {name: [piece.xxh3_128 for piece in entry.pieces] for name, entry in found.items()}


def layouts(ranks: int) -> list[dict[str, object]]:
    pipelines = ("gpipe", "1f1b", "interleaved", "zb-h1") if ranks in (2, 4) else ()
    return [
        {"data": ranks},
        {"data": ranks, "overlap": "after"},
        *({"pipeline": ranks, "schedule": name} for name in pipelines),
    ]


def test_losses_are_the_cpu_s_in_every_layout(
    data: Path, folder: Path, comm: MPI.Intracomm, gpu: torch.device
) -> None:
    for mask in (False, True) if comm.rank == 0 else ():
        asked = {"parallel": {"data": 1}, "data": {"document_mask": mask}}
        train(recipe(data, folder / f"cpu{mask}", "cpu", **asked), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    for number, parallel in enumerate(layouts(comm.size)):
        for mask in (False, True) if number == 0 else (False,):
            run = folder / f"gpu{number}{mask}"
            asked = recipe(data, run, gpu, parallel=parallel, data={"document_mask": mask})
            train(asked, comm, QUIET)
            comm.Barrier()
            found, expected = losses(run), losses(folder / f"cpu{mask}")
            assert len(found) == STEPS
            assert found == pytest.approx(expected, rel=2e-4), parallel


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_dtypes_learn_as_float32_does(
    data: Path, folder: Path, comm: MPI.Intracomm, gpu: torch.device, dtype: str
) -> None:
    for name in ("float32", dtype):
        settings = {"dtype": name, "steps": 60, "microbatch": 2}
        train(recipe(data, folder / name, gpu, train=settings), comm, QUIET)
    comm.Barrier()
    whole, lower = losses(folder / "float32"), losses(folder / dtype)
    assert lower != whole
    assert lower[-1] == pytest.approx(whole[-1], rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    data: Path, folder: Path, comm: MPI.Intracomm, gpu: torch.device, dtype: str
) -> None:
    """With a context of several blocks of attention, whose sums come in any order by default."""
    run = folder / "run"
    settings = {"dtype": dtype, "save_every": 4, "fixed_order": True, "batch": 8}
    model = {"context": 256, "layers": 2}
    asked = recipe(data, run, gpu, train=settings | {"steps": 8}, model=model)
    train(asked, comm, QUIET)
    whole, first = hashes(run, comm), losses(run)
    if comm.rank == 0:
        shutil.rmtree(run / CHECKPOINTS / "step-00000008")
    comm.Barrier()
    train(asked, comm, QUIET, resume=True)
    comm.Barrier()
    assert hashes(run, comm) == whole
    assert losses(run) == first


def test_a_fixed_order_gives_the_bits_of_one_rank(
    data: Path, folder: Path, comm: MPI.Intracomm, gpu: torch.device
) -> None:
    settings = {"batch": 8, "fixed_order": True, "steps": 6}
    if comm.rank == 0:
        train(recipe(data, folder / "one", gpu, train=settings), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    if comm.size in (2, 4):
        for axis in ("data", "pipeline"):
            run = folder / axis
            asked = recipe(data, run, gpu, train=settings, parallel={axis: comm.size})
            train(asked, comm, QUIET)
            comm.Barrier()
            assert losses(run) == losses(folder / "one"), axis


def test_what_a_gpu_has_saved_is_the_same_on_the_cpu(
    data: Path, folder: Path, comm: MPI.Intracomm, gpu: torch.device
) -> None:
    run = folder / "run"
    train(recipe(data, run, gpu), comm, QUIET)
    scores = {}
    for device in (gpu.type, "cpu"):
        if comm.rank == 0:
            out = io.StringIO()
            says = Console(stream=out)
            print_evaluation(run, None, False, True, MPI.COMM_SELF, says, device=device)
            scores[device] = json.loads(out.getvalue())["model"]["loss"]
    if comm.rank == 0:
        assert scores[gpu.type] == pytest.approx(scores["cpu"], rel=1e-5)
        # It continues there, too.
        again = recipe(data, run, "cpu", train={"steps": STEPS + 2}, parallel={"data": 1})
        train(again, MPI.COMM_SELF, QUIET, resume=True)
        assert len(losses(run)) == STEPS + 2


def test_text_is_the_same_on_a_gpu(
    data: Path, folder: Path, comm: MPI.Intracomm, gpu: torch.device
) -> None:
    run = folder / "run"
    train(recipe(data, run, gpu), comm, QUIET)
    texts = []
    for device in (gpu.type, "cpu"):
        out = io.StringIO()
        # Longer than the context: the cache is filled, and begun again.
        sampling = Sampling(max_tokens=100, temperature=0.0)
        print_generation(run, "the ", sampling, comm, Console(comm.rank == 0, out), device)
        texts.append(out.getvalue())
    assert texts[0] == texts[1]
    assert comm.rank or len(texts[0]) > 50


def test_auto_takes_bfloat16_where_the_gpu_has_it(comm: MPI.Intracomm, gpu: torch.device) -> None:
    if torch.cuda.get_device_capability(gpu) < (8, 0) or torch.version.cuda is None:
        pytest.skip("needs a GPU that multiplies bfloat16")
    assert choose_dtype("default", str(gpu), comm, QUIET) == "bfloat16"


def test_times_of_passes_are_those_of_the_gpu(
    data: Path, folder: Path, comm: MPI.Intracomm, gpu: torch.device
) -> None:
    """The forward and backward passes take most of a step, and no two overlap."""
    run = folder / "run"
    wide = {"layers": 4, "width": 1024, "heads": 8, "kv_heads": 8, "context": 256}
    settings = {"batch": 8 * comm.size, "microbatch": 8, "steps": 6}
    asked = recipe(data, run, gpu, model=wide, train=settings)
    train(asked, comm, QUIET, trace=True, node_map=NodeMap((tuple(range(comm.size)),)))
    if comm.rank:
        return
    events = [
        event
        for event in json.loads((run / "trace.json").read_text())["traceEvents"]
        if event["ph"] == "X" and event["tid"] == 0 and event["args"]["step"] == 6
    ]
    passes = [event for event in events if event["name"][0].isdigit()]
    assert [event["name"] for event in passes] == ["0F0", "0B0"]
    assert passes[0]["ts"] + passes[0]["dur"] <= passes[1]["ts"] + 1.0
    whole = events[-1]["ts"] + events[-1]["dur"] - events[0]["ts"]
    assert sum(event["dur"] for event in passes) > 0.4 * whole
