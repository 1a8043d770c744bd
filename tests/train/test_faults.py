"""Runs that meet a fault: nothing wrong is kept, nothing is lost, and the ranks end together."""

import errno
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import CheckpointError, DataError, DivergedError, LayoutError, MpillmError
from mpillm.machine.memory import HostMemory
from mpillm.runs import lock
from mpillm.runs.folder import HISTORY, LOCK, METRICS, OUTCOME, PICTURE
from mpillm.runs.lock import LostLockError, this_process
from mpillm.system.console import Console, counted
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.train import hold, setup
from mpillm.train.hold import locked_run
from mpillm.train.recipe import OLD_SPELLINGS, Recipe, parse_recipe
from mpillm.train.resuming import changed_settings
from mpillm.train.setup import train
from mpillm.train.step import StepResult, Trainer
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.finding import find
from mpillm.weights.leftovers import temporary_folder
from mpillm.weights.places import CHECKPOINTS, INDEX

QUIET = Console(speaks=False)
WILD = {"learning_rate": 1e38, "warmup_steps": 0}


def recipe(dataset: Path, run: Path, /, **sections: dict[str, object]) -> Recipe:
    table: dict[str, dict[str, object]] = {
        "model": {"layers": 1, "width": 16, "heads": 2, "context": 16},
        "data": {"path": str(dataset)},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 1},
        "train": {"run": str(run), "steps": 4, "batch": 12},
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section}
    return parse_recipe(table, "test")


def saved_in(run: Path) -> list[str]:
    folder = run / CHECKPOINTS
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def check_failed(run: Path, comm: MPI.Intracomm, words: str) -> None:
    """Check what a failed run leaves: its reason, no lock, no picture."""
    comm.Barrier()
    assert (run / OUTCOME).read_text() == "failed\n"
    last = json.loads((run / HISTORY).read_text().splitlines()[-1])
    assert last["event"] == "failed"
    assert words in last["reason"]
    assert not (run / LOCK).exists()
    assert not (run / PICTURE).exists()
    comm.Barrier()


@pytest.mark.parametrize("every", [0, 1])
def test_weights_that_are_no_numbers_are_not_saved(
    data: Path, folder: Path, comm: MPI.Intracomm, every: int
) -> None:
    run = folder / "run"
    wild = recipe(data, run, optimizer=WILD, train={"steps": 1, "save_every": every})
    words = r"after step 1 the norm of (model|optimizer)/\S+ is not .* no checkpoint was saved yet"
    with pytest.raises(DivergedError, match=words) as caught:
        train(wild, comm, QUIET)
    assert caught.value.exit_code == 3
    assert saved_in(run) == []
    check_failed(run, comm, "is not finite")


def test_a_run_continues_from_before_it_diverged(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    run = folder / "run"
    train(recipe(data, run, train={"steps": 2}), comm, QUIET)
    wild = {"optimizer": WILD, "train": {"save_every": 1, "keep": 1}}
    with pytest.raises(DivergedError, match=r"the last good checkpoint is \S+step-00000002"):
        train(recipe(data, run, **wild), comm, QUIET, resume=True)
    assert saved_in(run) == ["step-00000002"]
    train(recipe(data, run), comm, QUIET, resume=True)
    checkpoint = find(run, comm, QUIET)
    assert checkpoint.step == 4
    checkpoint.verify()


NAN_TASK = """
import torch
from mpillm.tasks.causal_lm import CausalLM
class Task(CausalLM):
    def loss_sum(self, *arguments):
        loss = super().loss_sum(*arguments)
        return loss if torch.is_grad_enabled() else loss * float("nan")
"""


def test_a_validation_loss_that_is_none_is_a_divergence(
    data: Path, folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder / "run"
    if comm.rank == 0:
        (folder / "nan_task.py").write_text(NAN_TASK)
    comm.Barrier()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "nan_task", raising=False)
    settings = {"save_every": 2, "evaluate_every": 4}
    bad = recipe(data, run, task={"name": "nan_task:Task"}, train=settings)
    words = (
        r"after step 4 the validation loss is nan; this comes from the weights in "
        r"\S+step-00000004: remove it, and --resume continues from \S+step-00000002"
    )
    with pytest.raises(DivergedError, match=words) as caught:
        train(bad, comm, QUIET)
    assert caught.value.exit_code == 3
    check_failed(run, comm, "validation loss")
    assert "NaN" not in (run / METRICS).read_text()


def after_step(
    monkeypatch: pytest.MonkeyPatch, number: int, work: Callable[[], object], rank: int = 0
) -> None:
    """Call `work` on one rank once the step `number` is computed."""

    class Harmed(Trainer):
        def step(self, step: int, stop: int = 0) -> StepResult:
            result = super().step(step, stop)
            if step + 1 == number and self.mesh.comm.rank == rank:
                work()
            self.mesh.comm.Barrier()
            return result

    monkeypatch.setattr(setup, "Trainer", Harmed)


def replace_lock(run: Path) -> None:
    """Take the lock as another job does while this one is suspended."""
    other = replace(this_process(None), host="node9", token="another")
    # Whole at once, as a job puts it: a beat that read a part would take it for damaged.
    whole = run.with_name("other-lock")
    whole.write_text(json.dumps(asdict(other)))
    whole.replace(run / LOCK)


@pytest.mark.parametrize("beat_seconds", [15.0, 0.001])
def test_a_job_that_was_replaced_writes_nothing_more(
    data: Path,
    folder: Path,
    comm: MPI.Intracomm,
    monkeypatch: pytest.MonkeyPatch,
    beat_seconds: float,
) -> None:
    """By the beat it stops at once; before the next beat it stops at the save."""
    run, left = folder / "run", {}
    monkeypatch.setattr(lock, "BEAT_SECONDS", beat_seconds)

    def suspend() -> None:
        replace_lock(run)
        for name in (METRICS, HISTORY, OUTCOME):
            left[name] = (run / name).read_bytes()

    after_step(monkeypatch, 3, suspend)
    with pytest.raises(LostLockError, match=r"is held by process \d+ on node9") as caught:
        train(recipe(data, run, train={"save_every": 3, "steps": 8}), comm, QUIET)
    assert caught.value.exit_code not in (0, 75)
    comm.Barrier()
    if comm.rank == 0:
        lines = (run / METRICS).read_bytes()
        # The lines up to the takeover, and the one of that step where the beat was not yet due.
        assert lines.startswith(left.pop(METRICS))
        assert lines.count(b"\n") <= 3
        assert left == {name: (run / name).read_bytes() for name in left}
        assert json.loads((run / LOCK).read_text())["token"] == "another"
        assert not (run / PICTURE).exists()
    assert saved_in(run) == []


def test_a_save_that_fails_ends_all_ranks_with_one_reason(
    data: Path, folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder / "run"
    target = run / CHECKPOINTS / "step-00000004"
    after_step(monkeypatch, 3, lambda: target.write_text("mine"), rank=comm.size - 1)
    with pytest.raises(CheckpointError, match=r"step-00000004 is a file.*move it"):
        train(recipe(data, run, train={"save_every": 2}), comm, QUIET)
    check_failed(run, comm, "is a file")
    assert saved_in(run) == ["step-00000002", "step-00000004"]
    assert target.read_text() == "mine"


def test_a_name_that_a_save_will_need_is_tried_before_the_first_step(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    run = folder / "run"
    if comm.rank == 0:
        run.mkdir()
        temporary_folder(run / CHECKPOINTS / "step-00000002")
        (run / CHECKPOINTS / "step-00000003").write_text("mine")
    comm.Barrier()
    with pytest.raises(CheckpointError, match="step-00000003 is a file"):
        train(recipe(data, run), comm, QUIET, resume=True)
    comm.Barrier()
    assert not (run / METRICS).exists()
    assert not (run / LOCK).exists()
    # What a killed save had left is gone.
    assert saved_in(run) == ["step-00000003"]


@pytest.fixture
def own_data(folder: Path, documents: Path, comm: MPI.Intracomm) -> Path:
    """Prepare a dataset that the test may damage."""
    options = PrepareOptions((str(documents),), folder / "data", tokenizer="bytes", validation=0.1)
    prepare(options, comm, QUIET)
    return folder / "data"


@pytest.mark.parametrize("harm", ["missing", "cut", "another"])
def test_a_damaged_tokenizer_of_the_data_is_found_first(
    own_data: Path, folder: Path, comm: MPI.Intracomm, harm: str
) -> None:
    path = own_data / "tokenizer.json"
    if comm.rank == 0:
        text = path.read_text()
        if harm == "missing":
            path.unlink()
        else:
            path.write_text(text[:100] if harm == "cut" else text + " ")
    comm.Barrier()
    with pytest.raises(DataError, match="tokenizer"):
        train(recipe(own_data, folder / "run"), comm, QUIET)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vocab_size": 10**12}, r"alone need [\d,.]+ TiB, .* of \d+ hosts? is [\d.]+ [GTM]iB"),
        ({"layers": 1 << 60}, r"weights alone need [\d,.]+ \S*iB"),
        ({"width": 1 << 40}, r"weights alone need [\d,.]+ \S*iB"),
        ({"width": 1 << 40, "layers": 1 << 60}, r"weights alone need [\d,.]+ \S*iB"),
        ({"batch": 10**12}, r"are [\d,.]+ \S*iB of ids alone"),
        ({"batch": 1 << 60}, r"are [\d,.]+ \S*iB of ids alone"),
    ],
)
def test_a_model_beyond_all_memory_is_refused_with_its_bytes(
    data: Path, folder: Path, comm: MPI.Intracomm, settings: dict[str, object], words: str
) -> None:
    section = "train" if "batch" in settings else "model"
    with pytest.raises(LayoutError, match=words):
        train(recipe(data, folder / "run", **{section: settings}), comm, QUIET)
    assert not (folder / "run").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_layout_beyond_the_memory_of_a_host_is_refused_with_the_table(
    data: Path,
    folder: Path,
    comm: MPI.Intracomm,
    monkeypatch: pytest.MonkeyPatch,
    resume: bool,
) -> None:
    """On every rank alike, before a model is built; no new folder is left."""
    monkeypatch.setattr(setup, "read_memory", lambda: HostMemory(64 << 20, 64 << 20, 64 << 20))
    with pytest.raises(LayoutError) as caught:
        train(recipe(data, folder / "run"), comm, QUIET, resume=resume)
    text = str(caught.value)
    assert len(set(comm.allgather(text))) == 1
    assert f"{counted(comm.size, 'rank')} of a host may need " in text
    assert "and it has 64.0 MiB:" in text
    for kind in ("weights", "optimizer", "process", "total"):
        assert re.search(rf"^  {kind} +[\d.]+ [KMG]iB +[\d.]+ [KMG]iB$", text, re.M), kind
    assert ("parallel.zero = 3: " in text) == (comm.size > 1)
    assert "or take a smaller model" in text
    assert text.endswith("--force")
    comm.Barrier()
    assert not (folder / "run").exists()


def test_a_run_that_is_forced_trains_with_a_warning(
    data: Path, folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "read_memory", lambda: HostMemory(64 << 20, 64 << 20, 64 << 20))
    run, printed = folder / "run", io.StringIO()
    train(recipe(data, run), comm, Console(comm.rank == 0, printed), force=True)
    assert saved_in(run) == ["step-00000004"]
    if comm.rank == 0:
        assert printed.getvalue().count("of a host may need") == 1
        assert "--force trains all the same" in printed.getvalue()


def test_where_the_memory_is_unknown_nothing_is_refused(
    data: Path, folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "read_memory", lambda: HostMemory(0, 0, 0))
    run, printed = folder / "run", io.StringIO()
    train(recipe(data, run, train={"steps": 1}), comm, Console(comm.rank == 0, printed))
    assert "of a host may need" not in printed.getvalue()


def test_each_changed_setting_is_printed_when_a_run_continues(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    run = folder / "run"
    train(recipe(data, run), comm, QUIET)
    printed = io.StringIO()
    changed = recipe(
        data,
        run,
        data={"document_mask": True},
        optimizer={"learning_rate": 0.5, "beta1": 0.0, "warmup_steps": 6},
        train={"dtype": "bfloat16", "steps": 6, "run": str(run.parent / "." / "run")},
    )
    train(changed, comm, Console(comm.rank == 0, printed), resume=True)
    if comm.rank == 0:
        lines = printed.getvalue().splitlines()
        assert [line for line in lines if " was " in line] == [
            "data.document_mask was false, is true",
            "optimizer.learning_rate was 0.003, is 0.5",
            "optimizer.warmup_steps was 1, is 6",
            "optimizer.beta1 was 0.9, is 0.0",
            "train.steps was 4, is 6",
            'train.dtype was "float32", is "bfloat16"',
        ]
        text = " ".join(printed.getvalue().split())
        assert "the learning rate rises from 0.0003 at step 4 to 0.417 at step 5" in text
        assert "optimizer.warmup_steps = 6 and train.steps = 6: the whole run is warm-up" in text


def test_a_run_that_continues_unchanged_prints_no_change(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    run = folder / "run"
    half = recipe(data, run, train={"save_every": 2})
    train(half, comm, QUIET)
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(run / CHECKPOINTS / "step-00000004")
    comm.Barrier()
    printed = io.StringIO()
    train(half, comm, Console(comm.rank == 0, printed), resume=True)
    assert " was " not in printed.getvalue()
    assert "rises" not in printed.getvalue()


def harm_name(index: dict[str, dict[str, object]]) -> None:
    index["tensors"]["model/norm/weighu"] = index["tensors"].pop("model/norm/weight")


def harm_slot(index: dict[str, dict[str, object]]) -> None:
    name = next(name for name in index["tensors"] if name.startswith("optimizer/"))
    index["tensors"].pop(name)


def harm_fact(index: dict[str, dict[str, object]]) -> None:
    index["facts"]["recipe"] = None


def harm_model(index: dict[str, dict[str, object]]) -> None:
    index["facts"]["recipe"]["model"]["layers"] = 1 << 60  # type: ignore[index]


def harm_setting(index: dict[str, dict[str, object]]) -> None:
    model = index["facts"]["recipe"]["model"]  # type: ignore[index]
    model["witdh"] = model.pop("width")


@pytest.mark.parametrize("harm", [harm_name, harm_slot, harm_fact, harm_model, harm_setting])
def test_whatever_is_wrong_with_the_newest_the_one_before_is_found(
    data: Path,
    folder: Path,
    comm: MPI.Intracomm,
    harm: Callable[[dict[str, dict[str, object]]], None],
) -> None:
    """As an earlier release wrote it: without the digest that would find each at once."""
    run = folder / "run"
    settings = recipe(data, run, train={"save_every": 2})
    train(settings, comm, QUIET)
    before = Checkpoint(run / CHECKPOINTS / "step-00000004").tensors
    comm.Barrier()
    if comm.rank == 0:
        path = run / CHECKPOINTS / "step-00000004" / INDEX
        index = json.loads(path.read_text())
        del index["digest"]
        harm(index)
        path.write_text(json.dumps(index))
    comm.Barrier()
    printed = io.StringIO()
    train(settings, comm, Console(comm.rank == 0, printed), resume=True)
    if comm.rank == 0:
        text = " ".join(printed.getvalue().split())
        assert "passing over a checkpoint that is not whole: " in text
        assert "step-00000002" in text
    assert Checkpoint(run / CHECKPOINTS / "step-00000004").tensors == before


def test_errors_of_torch_are_explained() -> None:
    from mpillm.models.linear_head import LinearHead
    from mpillm.models.part_module import torch_explained
    from mpillm.tasks.cross_entropy import cross_entropy_sum

    with pytest.raises(MemoryError, match=r"torch asked for \d"), torch_explained():
        torch.empty(1 << 55)
    full = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.25 GiB "
        "of which 1.05 GiB is free. Process 7 has 78.19 GiB memory in use."
    )
    words = "torch asked for 2.00 GiB, and 1.05 GiB of the 79.25 GiB of GPU 1 are free"
    with pytest.raises(MemoryError, match=words), torch_explained():
        raise torch.OutOfMemoryError(full)
    embedding = torch.nn.Embedding(4, 2)
    with pytest.raises(DataError, match="not in the model's vocabulary"), torch_explained():
        embedding(torch.tensor([7]))
    head, targets = LinearHead(torch.ones(1, 1, 2), embedding.weight), torch.tensor([[7]])
    for output in (head, head.logits()):
        with pytest.raises(DataError, match="not in the model's vocabulary"), torch_explained():
            cross_entropy_sum(output, targets)
    with pytest.raises(RuntimeError, match="size"), torch_explained():
        torch.ones(2) @ torch.ones(3)
    with pytest.raises(MpillmError), torch_explained():
        raise DataError("as it is")


@pytest.mark.parametrize("settings", [{"save_every": 2}, {"evaluate_every": 2, "save_every": 4}])
def test_another_dataset_under_the_path_is_not_trained_on(
    own_data: Path,
    folder: Path,
    documents: Path,
    comm: MPI.Intracomm,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, object],
) -> None:
    """It is replaced after the first step: nothing is saved, nor evaluated, after that."""
    other = PrepareOptions((str(documents),), own_data, tokenizer="bytes", validation=0.2)
    run = folder / "run"

    def replace_data() -> None:
        prepare(replace(other, overwrite=True), MPI.COMM_SELF, QUIET)

    after_step(monkeypatch, 1, replace_data)
    with pytest.raises(MpillmError, match="is another dataset now than the one that the run began"):
        train(recipe(own_data, run, train=settings), comm, QUIET)
    check_failed(run, comm, "another dataset")
    assert saved_in(run) == []
    assert "validation_loss" not in (run / METRICS).read_text()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_log_that_cannot_be_written_does_not_end_a_saved_run(
    data: Path,
    folder: Path,
    comm: MPI.Intracomm,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], None],
) -> None:
    """From the first step on the history is a folder; outcome and trace are one, or a pipe."""
    run, out = folder / "run", io.StringIO()

    def harm() -> None:
        for name in (HISTORY, OUTCOME):
            (run / name).rename(run / f"{name}.before")
        (run / HISTORY).mkdir()
        make(run / OUTCOME)
        make(run / "trace.json")

    after_step(monkeypatch, 1, harm)
    says = Console(speaks=comm.rank == 0, stream=out)
    train(recipe(data, run, train={"save_every": 2, "keep": 1}), comm, says, trace=True)
    comm.Barrier()
    assert saved_in(run) == ["step-00000004"]
    assert not (run / LOCK).exists()
    if comm.rank == 0:
        said = " ".join(out.getvalue().split())
        assert said.count("a record of the run is incomplete") == 4
        assert "finished: " in said


@pytest.mark.parametrize("name", [HISTORY, METRICS])
def test_a_log_that_cannot_be_begun_fails_on_all_ranks(
    data: Path, folder: Path, comm: MPI.Intracomm, name: str
) -> None:
    run = folder / "run"
    if comm.rank == 0:
        (run / name).mkdir(parents=True)
    comm.Barrier()
    with pytest.raises(MpillmError, match="cannot write"):
        train(recipe(data, run), comm, QUIET, resume=True)
    comm.Barrier()
    assert not (run / LOCK).exists()


def test_a_run_is_no_part_of_a_dataset(own_data: Path, comm: MPI.Intracomm) -> None:
    before = sorted(path.name for path in own_data.iterdir())
    comm.Barrier()
    for run in (own_data, own_data / "run"):
        with pytest.raises(MpillmError, match=r"is inside of the dataset .*another train\.run"):
            train(recipe(own_data, run), comm, QUIET)
    assert sorted(path.name for path in own_data.iterdir()) == before


def test_files_that_a_killed_job_left_are_removed_at_the_start(
    folder: Path, comm: MPI.Intracomm
) -> None:
    old = [f".{name}.{'0a' * 8}.tmp" for name in (LOCK, "report.html", "job.json")]
    own = [f".{name}.{'0a' * 8}.tmp" for name in (METRICS, OUTCOME, "recipe.toml")]
    fresh = f".report.html.{'0b' * 8}.tmp"
    mine = [".metrics.jsonl.tmp", f".notes.{'0a' * 8}.tmp", f".metrics.jsonl.{'0A' * 8}.tmp"]
    aside = f".lock.{'0c' * 16}.left"
    if comm.rank == 0:
        for name in (*old, *own, fresh, *mine, aside):
            (folder / name).touch()
        for name in (*old, aside):
            os.utime(folder / name, (0, 0))
    comm.Barrier()
    with locked_run(folder, comm, None):
        found = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
        comm.Barrier()
    assert found == sorted([fresh, *mine])


def test_a_lock_is_given_back_where_the_start_fails(
    folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(hold, "remove_leftovers", fails)
    with (
        pytest.raises(DataError, match="Permission denied"),
        locked_run(folder / "run", comm, None),
    ):
        pass
    comm.Barrier()
    assert not (folder / "run").exists()


def test_a_rank_that_fails_alone_does_not_meet_those_that_leave(
    folder: Path, python: Callable[..., Any]
) -> None:
    script = folder / "lone.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from mpi4py import MPI\n"
        "from mpillm.comm.failure import fail_together\n"
        "from mpillm.errors import UsageError\n"
        "from mpillm.train.hold import locked_run\n"
        "comm = MPI.COMM_WORLD\n"
        "with fail_together(comm), locked_run(Path(sys.argv[1]), comm, None):\n"
        "    if comm.rank == 1:\n"
        "        raise UsageError('alone')\n"
    )
    done = python(script, folder / "run", ranks=2)
    assert done.returncode != 0
    assert "rank 1 of 2" in done.stderr
    assert "alone" in done.stderr


def test_old_spellings_are_no_change_of_settings(data: Path, folder: Path) -> None:
    new = {
        place.partition(".")[2]: next(iter(names.values()))
        for place, names in OLD_SPELLINGS.items()
    }
    now = recipe(data, folder / "run", parallel=new)
    before = now.to_dict()
    for place, names in OLD_SPELLINGS.items():
        section, _, key = place.partition(".")
        old = [was for was, new in names.items() if new == before[section][key]]
        assert old
        before[section][key] = old[0]
    assert changed_settings(before, now) == []


def test_a_run_without_memory_names_settings_and_checkpoint(
    data: Path, folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Trainer):
        def step(self, step: int, stop: int = 0) -> StepResult:
            if step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().step(step, stop)

    monkeypatch.setattr(setup, "Trainer", Full)
    with pytest.raises(MemoryError) as found:
        train(recipe(data, folder / "run", train={"save_every": 2}), comm, QUIET)
    asked, remedy = found.value.args
    assert asked == "torch asked for 2.00 GiB"
    assert " (the batch stays as it is): " in remedy
    assert "step-00000002; --resume continues from it" in remedy
