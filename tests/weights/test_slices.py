"""Slices: any writers with any cuts, and any readers with any others, give the whole tensor."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mpi4py import MPI
from torch import Tensor

from mpillm.system.console import Console
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.finding import newest_whole
from mpillm.weights.places import CHECKPOINTS
from mpillm.weights.saving import save
from mpillm.weights.slices import Box, TensorSlice, run_boxes, split_run, whole_box

QUIET = Console(speaks=False)
SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


def whole_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(1, 1 + math.prod(shape)).reshape(shape).to(dtype)


def grid(shape: tuple[int, ...], cuts: list[list[int]]) -> list[Box]:
    """Cut a tensor at the given places along each dim into boxes."""
    edges = [sorted({0, n, *(cut % n for cut in own)}) for n, own in zip(shape, cuts, strict=True)]
    spans = [list(itertools.pairwise(own)) for own in edges]
    return [
        Box(tuple(a for a, _ in chosen), tuple(b - a for a, b in chosen))
        for chosen in itertools.product(*spans)
    ]


def cut(tensor: Tensor, box: Box) -> TensorSlice:
    return TensorSlice(tensor[box.within(whole_box(tensor.shape))], box.start, tuple(tensor.shape))


def empty_slice(shape: tuple[int, ...], box: Box, dtype: torch.dtype) -> TensorSlice:
    return TensorSlice(torch.zeros(box.size, dtype=dtype), box.start, shape)


@st.composite
def cut_shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box], list[Box]]:
    """Draw a shape and two ways to cut it."""
    shape = draw(SHAPES)
    cuts = st.lists(st.integers(0, 5), max_size=2)
    ways = [grid(shape, [draw(cuts) for _ in shape]) for _ in range(2)]
    return shape, *ways


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cut_shapes(), bfloat=st.booleans(), in_part=st.booleans())
def test_any_cuts_write_and_any_others_read(
    tmp_path: Path,
    case: tuple[tuple[int, ...], list[Box], list[Box]],
    bfloat: bool,
    in_part: bool,
) -> None:
    """One rank that holds every box of a cut writes what many would; so does the reading."""
    shape, written, read = case
    dtype = torch.bfloat16 if bfloat else torch.float32
    tensor = whole_tensor(shape, dtype)
    path = save(
        tmp_path, {"a/b": [cut(tensor, box) for box in written]}, {"step": 1}, {}, MPI.COMM_SELF
    )
    checkpoint = Checkpoint(path)
    if in_part:
        checkpoint.verify()
    for box in read:
        part = empty_slice(shape, box, dtype)
        checkpoint.load({"a/b": part})
        assert torch.equal(part.tensor, cut(tensor, box).tensor)
    found = torch.zeros(shape, dtype=dtype)
    checkpoint.load({"a/b": found})
    assert torch.equal(found, tensor)


@given(case=cut_shapes())
def test_boxes_know_their_common_part_and_their_span(
    case: tuple[tuple[int, ...], list[Box], list[Box]],
) -> None:
    """Against NumPy: index an array of element numbers."""
    shape, some, others = case
    numbers = np.arange(math.prod(shape)).reshape(shape)
    whole = whole_box(shape)
    for box, other in itertools.product(some, others):
        found = box.common(other)
        expected = np.intersect1d(numbers[box.within(whole)], numbers[other.within(whole)])
        assert (0 if found is None else found.numel) == len(expected)
        if found is not None:
            assert np.array_equal(np.sort(numbers[found.within(whole)], axis=None), expected)
            first, last = found.span(whole)
            assert (first, last) == (expected[0], expected[-1] + 1)


@given(shape=SHAPES, data=st.data())
def test_a_run_is_a_few_boxes_in_its_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    total = math.prod(shape)
    first = data.draw(st.integers(0, total))
    count = data.draw(st.integers(0, total - first))
    numbers = np.arange(total).reshape(shape)
    boxes = run_boxes(shape, first, count)
    found = [numbers[box.within(whole_box(shape))].reshape(-1) for box in boxes]
    assert np.concatenate([np.empty(0), *found]).tolist() == list(range(first, first + count))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_ranks_write_and_read_slices(folder: Path, comm: MPI.Intracomm, dim: int) -> None:
    """Each rank holds its own slice along one dim; any number of ranks reads another cut."""
    shape = (4, 5, 6)
    tensor = whole_tensor(shape)
    edges = np.linspace(0, shape[dim], comm.size + 1).astype(int).tolist()
    cuts: list[list[int]] = [[], [], []]
    cuts[dim] = edges[:-1]
    boxes = grid(shape, cuts)
    assert len(boxes) == comm.size
    tensors = {"cut": cut(tensor, boxes[comm.rank]), "same": tensor + 1}
    path = save(folder / CHECKPOINTS, tensors, {"step": 1}, {}, comm)
    checkpoint = newest_whole(folder, comm, QUIET)
    assert checkpoint is not None
    assert checkpoint.folder == path
    found = {"cut": torch.zeros(shape), "same": torch.zeros(shape)}
    checkpoint.load(found)
    assert torch.equal(found["cut"], tensor)
    assert torch.equal(found["same"], tensor + 1)
    assert len(checkpoint.tensors["cut"].pieces) == comm.size
    # A slice that all ranks hold is written by one of them.
    assert len(checkpoint.tensors["same"].pieces) == 1
    for box in grid(shape, [[2], [1, 3], [4]]):
        part = empty_slice(shape, box, torch.float32)
        Checkpoint(path).load({"cut": part})
        assert torch.equal(part.tensor, cut(tensor, box).tensor)


def test_flat_shards_of_any_length(folder: Path, comm: MPI.Intracomm) -> None:
    """As ZeRO holds them: rank r has a run of elements that begins and ends inside of rows."""
    shape = (7, 3, 5)
    tensor = whole_tensor(shape)
    bounds = np.linspace(0, tensor.numel(), comm.size + 1).astype(int).tolist()
    first, last = bounds[comm.rank : comm.rank + 2]
    flat = tensor.reshape(-1)[first:last].clone()
    path = save(folder, {"flat": split_run(flat, first, shape)}, {"step": 1}, {}, comm)
    found = torch.zeros(shape)
    Checkpoint(path).load({"flat": found})
    assert torch.equal(found, tensor)
    # Back into flat shards, of another cut.
    start = comm.rank * 11
    shard = torch.zeros(13)
    Checkpoint(path).load({"flat": split_run(shard, start, shape)})
    assert torch.equal(shard, tensor.reshape(-1)[start : start + 13])


def test_runs_are_written_as_version_1_and_boxes_as_version_2(
    folder: Path, comm: MPI.Intracomm
) -> None:
    own = folder / str(comm.rank)
    tensor = whole_tensor((4, 6))
    rows = [cut(tensor, box) for box in grid((4, 6), [[1], []])]
    columns = [cut(tensor, box) for box in grid((4, 6), [[], [2]])]
    for parts, version, keys in ((rows, 1, "first"), (columns, 2, "start")):
        path = save(own, {"a": parts}, {"step": 1}, {}, MPI.COMM_SELF)
        text = (path / "index.json").read_text()
        assert f'"version": {version},' in text
        assert f'"{keys}"' in text


def test_only_the_bytes_of_a_part_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a part in part where every byte was verified before."""
    tensor = whole_tensor((64, 32))
    path = save(tmp_path, {"a": tensor}, {"step": 1}, {}, MPI.COMM_SELF)
    sizes: list[int] = []
    monkeypatch.setattr(
        "mpillm.weights.checkpoint.hdf5.read_at",
        lambda _descriptor, values, _offset: sizes.append(values.nbytes),
    )
    monkeypatch.setattr("mpillm.weights.checkpoint.hdf5.digest", lambda _values: "")
    checkpoint = Checkpoint(path)
    checkpoint.verified = True
    part = empty_slice((64, 32), Box((8, 0), (4, 32)), torch.float32)
    checkpoint.load({"a": part})
    assert sizes == [4 * 32 * 4]
