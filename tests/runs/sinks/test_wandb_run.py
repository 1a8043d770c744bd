"""Weights & Biases, offline: its own reader finds what was logged."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpillm.runs.folder import RECIPE, WANDB
from mpillm.runs.metrics import MetricsWriter

pytest.importorskip("wandb", reason="needs wandb (pip install 'mpillm[wandb]')")


HEAD, BLOCK, RECORD_HEAD, ENDS = 7, 32_768, 7, (1, 4)


def chunks(data: bytes) -> Iterator[bytes]:
    """Split a .wandb file, in the format of LevelDB's log, into its records."""
    place, left = HEAD, b""
    while place < len(data):
        if BLOCK - place % BLOCK < RECORD_HEAD:
            place += BLOCK - place % BLOCK
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + RECORD_HEAD])
        left += data[place + RECORD_HEAD : place + RECORD_HEAD + size]
        place += RECORD_HEAD + size
        if kind in ENDS:
            yield left
            left = b""


def records(file: Path) -> tuple[str, list[dict[str, float]]]:
    """Read the identity of a run and its lines."""
    from wandb.proto import wandb_internal_pb2

    identity, lines = "", []
    for data in chunks(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        identity = record.run.run_id or identity
        items = {item.key or item.nested_key[0]: item for item in record.history.item}
        if items:
            lines.append({key: float(json.loads(item.value_json)) for key, item in items.items()})
    return identity, lines


def test_a_resumed_run_has_the_same_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / RECIPE).write_text("[train]\nsteps = 2\n")
    for last_step in (0, 1):
        writer = MetricsWriter(tmp_path, last_step, True, sinks=("wandb",))
        for step in (1, 2):
            writer.add({"step": step, "loss": 5.0 - step})
        writer.add({"step": 2, "validation_loss": 3.5})
        writer.close()
    found = [records(file) for file in (tmp_path / WANDB).glob("offline-run-*/*.wandb")]
    assert len({identity for identity, _ in found}) == 1
    for _, lines in found:
        logged = [{k: v for k, v in line.items() if not k.startswith("_")} for line in lines]
        assert logged == [
            {"step": 1, "loss": 4.0},
            {"step": 2, "loss": 3.0},
            {"step": 2, "validation_loss": 3.5},
        ]
