import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from mpillm.errors import CheckpointError, MismatchError
from mpillm.system.console import Console
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.finding import find, newest_whole
from mpillm.weights.places import CHECKPOINTS, INDEX, checkpoint_folders
from mpillm.weights.saving import assign_writers, prune, save

QUIET = Console(speaks=False)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/embedding/weight": torch.randn(30, 7, generator=generator),
        "model/layers/0/norm/weight": torch.randn(7, generator=generator),
        "model/half": torch.randn(5, 3, generator=generator).bfloat16(),
        "optimizer/exp_avg/embedding/weight": torch.randn(30, 7, generator=generator),
        "count": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 4),
    }


def write(folder: Path, comm: MPI.Intracomm, step: int) -> Path:
    folder.mkdir(exist_ok=True)
    return save(
        folder / CHECKPOINTS,
        tensors(step),
        {"step": step, "note": "x"},
        {"readme.txt": "hello"},
        comm,
    )


def test_what_is_saved_is_loaded(folder: Path, comm: MPI.Intracomm) -> None:
    path = write(folder, comm, 12)
    checkpoint = Checkpoint(path)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    checkpoint.load(found)
    for name, tensor in tensors(12).items():
        assert torch.equal(found[name], tensor), name
    assert (checkpoint.step, checkpoint.facts["note"], checkpoint.text("readme.txt")) == (
        12,
        "x",
        "hello",
    )
    checkpoint.verify()
    assert not list(folder.glob("checkpoints/.*"))


def test_another_number_of_ranks_reads_the_same(folder: Path, comm: MPI.Intracomm) -> None:
    together = write(folder, comm, 3)
    alone = write(folder / f"alone-{comm.rank}", MPI.COMM_SELF, 3)
    assert len(list(together.glob("rank-*.h5"))) == min(comm.size, len(tensors()))
    assert len(list(alone.glob("rank-*.h5"))) == 1
    for path in (together, alone):
        found = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
        Checkpoint(path).load(found)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors(3).items())


def test_any_hdf5_tool_may_look(folder: Path) -> None:
    path = write(folder / str(MPI.COMM_WORLD.rank), MPI.COMM_SELF, 1)
    with h5py.File(path / "rank-00000.h5") as file:
        assert (
            file["model/embedding/weight"][:] == tensors(1)["model/embedding/weight"].numpy()
        ).all()


def test_shares_are_even_and_complete() -> None:
    sizes = {f"t{i}": 1000 - 7 * i for i in range(40)}
    shares = assign_writers([sizes] * 3)
    assert sorted(name for names in shares for name in names) == sorted(sizes)
    loads = [sum(sizes[name] for name in names) for names in shares]
    assert max(loads) - min(loads) <= max(sizes.values())


def test_only_holders_write() -> None:
    shares = assign_writers([{"a": 5, "tied": 9}, {"b": 7, "tied": 9}, {"c": 1}])
    assert sorted(name for names in shares for name in names) == ["a", "b", "c", "tied"]
    assert shares[2] == ["c"]
    assert shares[0] == ["tied"] or "a" in shares[0]
    assert "b" in shares[1]


@pytest.mark.parametrize("harm", ["truncate", "flip", "index", "no index", "missing file"])
def test_a_damaged_checkpoint_is_passed_over(folder: Path, comm: MPI.Intracomm, harm: str) -> None:
    write(folder, comm, 1)
    newest = write(folder, comm, 2)
    comm.Barrier()
    if comm.rank == 0:
        hurt(newest, harm)
    comm.Barrier()
    found = newest_whole(folder, comm, QUIET)
    assert found is not None
    assert found.step == 1


def hurt(path: Path, harm: str) -> None:
    file = path / "rank-00000.h5"
    if harm == "truncate":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "flip":
        piece = next(
            p
            for e in json.loads((path / INDEX).read_text())["tensors"].values()
            for p in e["pieces"]
            if p["nbytes"] and p["file"] == file.name
        )
        data = bytearray(file.read_bytes())
        data[piece["offset"]] ^= 1
        file.write_bytes(data)
    elif harm == "index":
        (path / INDEX).write_text((path / INDEX).read_text()[:50])
    elif harm == "no index":
        (path / INDEX).unlink()
    else:
        file.unlink()


def test_when_none_is_whole_the_run_does_not_begin_anew(folder: Path, comm: MPI.Intracomm) -> None:
    path = write(folder, comm, 1)
    comm.Barrier()
    if comm.rank == 0:
        hurt(path, "truncate")
    comm.Barrier()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        newest_whole(folder, comm, QUIET)


def test_a_flipped_bit_is_refused_when_read(folder: Path) -> None:
    path = write(folder / str(MPI.COMM_WORLD.rank), MPI.COMM_SELF, 1)
    hurt(path, "flip")
    with pytest.raises(CheckpointError, match="its hash differs"):
        Checkpoint(path).load(
            {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
        )


def test_another_model_is_refused(folder: Path, comm: MPI.Intracomm) -> None:
    checkpoint = Checkpoint(write(folder, comm, 1))
    with pytest.raises(
        MismatchError, match=r"float32 \[30, 7\], the model wants float32 \[30, 8\]"
    ):
        checkpoint.load({"model/embedding/weight": torch.zeros(30, 8)})
    with pytest.raises(MismatchError, match="holds no tensor model/other"):
        checkpoint.load({"model/other": torch.zeros(1)})


def test_find_takes_a_run_or_a_checkpoint(folder: Path, comm: MPI.Intracomm) -> None:
    path = write(folder, comm, 4)
    assert find(path, comm, QUIET).step == find(folder, comm, QUIET).step == 4
    for wrong, words in (
        (folder / "nowhere", "does not exist"),
        (folder / CHECKPOINTS, "holds no checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=words):
            find(wrong, comm, QUIET)


def test_only_the_newest_are_kept(folder: Path, comm: MPI.Intracomm) -> None:
    for step in (1, 2, 10, 100):
        write(folder, comm, step)
    comm.Barrier()
    if comm.rank == 0:
        prune(folder / CHECKPOINTS, 2, {1, 2, 10, 100})
        assert sorted(path.name for path in (folder / CHECKPOINTS).iterdir()) == [
            "step-00000010",
            "step-00000100",
        ]


def test_a_full_disk_leaves_the_old_checkpoint(folder: Path, python: Callable[..., Any]) -> None:
    """A limit on file sizes makes writing fail as on a full disk (EFBIG in place of ENOSPC)."""
    script = folder / "fill.py"
    script.write_text(
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from mpi4py import MPI\n"
        "from mpillm.weights.saving import save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "folder, comm = Path(sys.argv[1]), MPI.COMM_WORLD\n"
        "save(folder, {'a': torch.zeros(10), 'b': torch.ones(9)}, {'step': 1}, {}, comm)\n"
        "if comm.rank == comm.size - 1:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "big = {'a': torch.zeros(1 << 20), 'b': torch.ones(1 << 20)}\n"
        "try:\n"
        "    save(folder, big, {'step': 2}, {}, comm)\n"
        "except Exception as failure:\n"
        "    print(type(failure).__name__, failure)\n"
    )
    for ranks in (1, 2):
        target = folder / str(ranks)
        done = python(script, target, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("CheckpointError") == ranks
        assert f"rank {ranks - 1} could not write" in done.stdout
        assert [path.name for path in target.iterdir()] == ["step-00000001"]
        Checkpoint(target / "step-00000001").verify()


def test_only_step_and_eight_digits_is_a_checkpoint(folder: Path, comm: MPI.Intracomm) -> None:
    write(folder, comm, 7)
    if comm.rank == 0:
        for name in ("step-7", "step-00000008.old", ".step-00000009.tmp", "step-0000001x"):
            (folder / CHECKPOINTS / name).mkdir()
    comm.Barrier()
    assert list(checkpoint_folders(folder / CHECKPOINTS)) == [7]
    found = newest_whole(folder, comm, QUIET)
    assert found is not None
    assert found.step == 7
    assert checkpoint_folders(folder / "nowhere") == {}


def test_the_first_of_several_faults_is_reported(folder: Path, comm: MPI.Intracomm) -> None:
    """However many ranks share the verification, the message is the one of a single rank."""
    write(folder, comm, 1)
    newest = write(folder, comm, 2)
    comm.Barrier()
    if comm.rank == 0:
        for entry in json.loads((newest / INDEX).read_text())["tensors"].values():
            for piece in entry["pieces"]:
                if piece["nbytes"]:
                    with (newest / piece["file"]).open("r+b") as file:
                        file.seek(piece["offset"])
                        [byte] = file.read(1)
                        file.seek(piece["offset"])
                        file.write(bytes([byte ^ 1]))
    comm.Barrier()
    stream = io.StringIO()
    found = newest_whole(folder, comm, Console(comm.rank == 0, stream))
    assert found is not None
    assert found.step == 1
    with pytest.raises(CheckpointError, match=r"^count in .* is damaged: its hash differs"):
        Checkpoint(newest).verify()
    if comm.rank == 0:
        said = " ".join(stream.getvalue().split())
        assert "passing over a checkpoint that is not whole: count in" in said
