"""A rank takes a GPU of its own, all ranks the same kind of device; the GPUs here are simulated."""

from types import SimpleNamespace

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import LayoutError
from mpillm.machine.node_map import NodeMap
from mpillm.parallel import devices
from mpillm.parallel.devices import choose_device, may_take_gpus, own_device

ALONE = NodeMap(((0,),))


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda number: SimpleNamespace(name="NVIDIA H200", uuid=f"GPU-{number}"),
    )


def on_ranks(
    node_map: NodeMap,
    wanted: str = "auto",
    gpus: str = "",
    share: bool = False,
    option: str = "train.device",
) -> list[str]:
    """Choose on every rank of `node_map`, as if each were asked in turn."""
    size = node_map.size
    answers = [devices._own_gpu(gpus, node_map, rank) for rank in range(size)]
    chosen = []
    for rank in range(size):
        comm = SimpleNamespace(
            rank=rank,
            size=size,
            allgather=lambda own: [own] * size if isinstance(own, bool) else answers,
        )
        chosen.append(choose_device(wanted, comm, node_map, gpus, share, option)[0])
    return chosen


def test_each_rank_of_a_node_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 4)
    two_nodes = NodeMap(((0, 2, 4), (1, 3)))
    assert on_ranks(two_nodes) == [
        "cuda:0",
        "cuda:0",
        "cuda:1",
        "cuda:1",
        "cuda:2",
    ]
    assert on_ranks(two_nodes, gpus="3,1,2,0") == ["cuda:3", "cuda:3", "cuda:1", "cuda:1", "cuda:2"]


def test_two_ranks_on_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 1)
    node = NodeMap(((0, 1),))
    with pytest.raises(LayoutError, match=r"ranks 0 and 1 would share NVIDIA H200 0; .*share_gpu"):
        on_ranks(node, "cuda")
    # A verb without a recipe has no such setting.
    with pytest.raises(LayoutError, match=r"--device = cuda: .* on the CPU: --device cpu"):
        on_ranks(node, option="--device")
    assert on_ranks(node, share=True) == ["cuda:0"] * 2


def test_a_device_has_its_number_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    names = ("cuda", "cuda:1", "cpu")
    assert [str(own_device(name)) for name in names] == ["cuda:3", "cuda:1", "cpu"]


def test_gpus_may_be_taken_where_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    assert [may_take_gpus(word) for word in ("auto", "cuda", "cpu")] == [False, True, False]
    with_gpus(monkeypatch, 1)
    assert [may_take_gpus(word) for word in ("auto", "cuda", "cpu")] == [True, True, False]


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    with pytest.raises(LayoutError, match=r"train\.gpus names GPU 7, and it sees 2, from 0"):
        on_ranks(ALONE, "cuda", "7")
    with_gpus(monkeypatch, 0)
    with pytest.raises(LayoutError, match="it sees no GPU"):
        on_ranks(ALONE, "cuda")
    assert on_ranks(ALONE) == ["cpu"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for GPUs")
def test_a_torch_without_gpus_is_named(comm: MPI.Intracomm) -> None:
    node = NodeMap((tuple(range(comm.size)),))
    with pytest.raises(LayoutError, match="is built for CPUs; install one for your GPUs"):
        choose_device("cuda", comm, node)
