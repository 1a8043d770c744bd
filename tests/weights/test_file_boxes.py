"""Boxes of tensors in a file: the values, and the bytes that are read for them."""

import random
from pathlib import Path

import pytest
import torch

from mpillm.weights import file_boxes
from mpillm.weights.file_boxes import read_box
from mpillm.weights.slices import Box, whole_box

OFFSET = 13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (3, 4, 5), (2, 1, 3, 4), (4, 0)])
def test_any_box_is_read_by_its_own_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    path, chance, read = tmp_path / "values", random.Random(7), []
    path.write_bytes(b"-" * OFFSET + bytes(whole.reshape(-1).view(torch.uint8).tolist()))
    real = file_boxes.read_at
    monkeypatch.setattr(
        file_boxes, "read_at", lambda f, v, o: (read.append(v.nbytes), real(f, v, o))
    )
    boxes = [whole_box(shape)]
    for _ in range(30):
        start = tuple(chance.randrange(n + 1) for n in shape)
        boxes.append(
            Box(start, tuple(chance.randint(0, n - a) for a, n in zip(start, shape, strict=True)))
        )
    for box in boxes:
        read.clear()
        found = read_box(path, OFFSET, shape, dtype, box)
        assert torch.equal(found, whole[box.within(whole_box(shape))])
        assert sum(read) == box.numel * dtype.itemsize
    read.clear()
    read_box(path, OFFSET, shape, dtype, whole_box(shape))
    assert len(read) <= 1


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"1234567")
    with pytest.raises(EOFError, match="ends before byte 8"):
        read_box(tmp_path / "short", 0, (2,), torch.float32, whole_box((2,)))
