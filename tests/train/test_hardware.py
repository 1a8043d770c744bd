"""The choice of device and dtype: the same on all ranks, and never a slower one by itself."""

import os

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import LayoutError, RecipeError
from mpillm.machine.node_map import NodeMap, map_nodes
from mpillm.system.console import Console
from mpillm.train import hardware
from mpillm.train.hardware import choose_dtype, choose_hardware, product_seconds
from mpillm.train.recipe import TrainSettings

QUIET = Console(speaks=False)
ALONE = NodeMap(((0,),))


class Said(Console):
    def __init__(self) -> None:
        super().__init__(speaks=False)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    warn = say


def timed(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    monkeypatch.setattr(
        hardware,
        "product_seconds",
        lambda device, names: {n: seconds[n] for n in names if n in seconds},
    )


@pytest.mark.parametrize(
    ("wanted", "device", "chosen"),
    [
        ("default", "cpu", "float32"),
        ("auto", "cpu", "bfloat16"),
        ("default", "cuda:0", "bfloat16"),
        ("bfloat16", "cpu", "bfloat16"),
        ("float16", "cpu", "float16"),
    ],
)
def test_a_fast_dtype_is_taken(
    monkeypatch: pytest.MonkeyPatch, wanted: str, device: str, chosen: str
) -> None:
    timed(monkeypatch, float32=1.0, bfloat16=0.25, float16=0.25)
    assert choose_dtype(wanted, device, MPI.COMM_SELF, QUIET) == chosen


def test_a_slow_dtype_is_not_taken_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, float32=1.0, bfloat16=90.0, float16=0.5)
    console = Said()
    assert choose_dtype("auto", "cpu", MPI.COMM_SELF, console) == "float32"
    assert choose_dtype("auto", "cuda:0", MPI.COMM_SELF, console) == "float16"
    assert choose_dtype("bfloat16", "cpu", MPI.COMM_SELF, console) == "bfloat16"
    assert "float32 (products against float32: bfloat16 0.011 times as fast)" in console.lines[0]
    assert "train.dtype=float32 is faster here" in console.lines[2]


def test_a_dtype_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, float32=1.0)
    with pytest.raises(LayoutError, match=r"train\.dtype = float16: cpu has no such products"):
        choose_dtype("float16", "cpu", MPI.COMM_SELF, QUIET)
    assert choose_dtype("auto", "cpu", MPI.COMM_SELF, QUIET) == "float32"


def test_all_ranks_choose_alike(monkeypatch: pytest.MonkeyPatch, comm: MPI.Intracomm) -> None:
    slow = comm.rank == comm.size - 1
    timed(monkeypatch, float32=1.0, bfloat16=2.0 if slow else 0.1)
    assert choose_dtype("auto", "cpu", comm, QUIET) == "float32"


def test_products_are_timed() -> None:
    found = product_seconds("cpu", ["float32", "bfloat16", "float16"])
    assert all(0 < seconds < 10 for seconds in found.values())
    assert "float32" in found


def test_a_resumed_run_keeps_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, float32=1.0, bfloat16=0.1)
    kept = choose_hardware(
        TrainSettings(dtype="auto"),
        {"dtype": "float32", "device": "cpu"},
        MPI.COMM_SELF,
        ALONE,
        QUIET,
    )
    assert (kept.precision.device, kept.precision.dtype) == ("cpu", "float32")
    named = choose_hardware(
        TrainSettings(dtype="bfloat16"), {"dtype": "float32"}, MPI.COMM_SELF, ALONE, QUIET
    )
    assert named.precision.dtype == "bfloat16"


@pytest.mark.parametrize("gpus", ["0;1", "a", "-1", "0,,1", "1.5", "٣"])
def test_odd_lists_of_gpus_are_refused(gpus: str) -> None:
    with pytest.raises(RecipeError, match="name the GPUs by number"):
        TrainSettings(gpus=gpus)


def test_a_lower_dtype_of_sums_has_no_fixed_order() -> None:
    with pytest.raises(RecipeError, match="leave one of them out"):
        TrainSettings(fixed_order=True, microbatch=1, reduce_dtype="bfloat16")


def test_float16_sums_without_a_scaled_loss_are_refused(comm: MPI.Intracomm) -> None:
    settings = TrainSettings(device="cpu", dtype="float32", reduce_dtype="float16")
    with pytest.raises(RecipeError, match=r"reduce_dtype = float16 with train\.dtype = float32"):
        choose_hardware(settings, {}, comm, map_nodes(comm), QUIET)


def test_without_a_time_in_float32_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: str, dtype: torch.dtype, float32: float | None) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(hardware, "_product_seconds", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        product_seconds("cuda:0", ["float32", "bfloat16"])


def test_a_fixed_order_takes_kernels_that_repeat_their_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(hardware, "choose_device", lambda *_: ("cuda:0", "1 × GPU"))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    for fixed in (False, True):
        settings = TrainSettings(fixed_order=fixed, microbatch=1, dtype="float32")
        choose_hardware(settings, {}, MPI.COMM_SELF, ALONE, QUIET)
    assert asked == [True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    torch.utils.deterministic.fill_uninitialized_memory = filled
