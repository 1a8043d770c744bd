"""A run under way: step after step, with its evaluations, its checkpoints, its record, and an end in good order."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mpillm.comm.failure import host_name, on_root
from mpillm.comm.waiting import patient_barrier
from mpillm.errors import CheckpointError, DivergedError, StoppedError
from mpillm.infer.evaluate import evaluate
from mpillm.infer.loading import RunConstants
from mpillm.launch.current_job import CurrentJob
from mpillm.launch.signals import StopSignals
from mpillm.launch.walltime import seconds_of
from mpillm.machine.cluster_profile import Cluster
from mpillm.parallel.data.same_weights import check_same
from mpillm.parallel.step_plan import traffic_bytes
from mpillm.runs.folder import METRICS, PICTURE, RECIPE, TRACE
from mpillm.runs.history import HistoryWriter, last_save_seconds
from mpillm.runs.lock import RunLock
from mpillm.runs.metrics import MetricsWriter, read_metrics
from mpillm.system.atomic import write_text
from mpillm.system.console import Console, Progress
from mpillm.system.versions import package_version
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.reader import open_split
from mpillm.train.optimizers.optimizer import set_steps, state_tensors
from mpillm.train.recipe import Recipe, write_recipe
from mpillm.train.step import StepResult, Trainer
from mpillm.train.stopping import Stopping
from mpillm.train.trace import StepTrace
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.names import slot_tensors, weight_tensors
from mpillm.weights.places import CHECKPOINTS
from mpillm.weights.saving import prune, save

if TYPE_CHECKING:
    from mpi4py import MPI

PACKAGES = ("mpillm", "torch", "mpi4py", "h5py", "numpy")


@dataclass(frozen=True)
class Allotment:
    """What the surroundings of a run allow it and ask of it."""

    signals: StopSignals | None = None
    """None: nobody asks it to stop."""
    job: CurrentJob | None = None
    end: float | None = None
    """When the batch system ends the job, in unix seconds; None: not known."""
    begun: float = 0.0
    """When the process began: train.time_limit counts from there. 0: now."""

    def deadline(self, time_limit: str) -> float | None:
        """The earlier of the batch system's end and the recipe's limit."""
        limits = [self.end] if self.end is not None else []
        if time_limit:
            limits.append((self.begun or time.time()) + seconds_of(time_limit))
        return min(limits, default=None)


@contextmanager
def held(folder: Path, comm: "MPI.Intracomm", job: CurrentJob | None) -> Iterator[None]:
    """Keep other jobs from the run in `folder` while the block runs. Every rank calls it.

    Raises UsageError where another job holds the run.
    """
    locks: list[RunLock] = []
    on_root(comm, lambda: locks.append(RunLock(folder, job)))
    try:
        yield
    finally:
        for lock in locks:
            lock.release()


class TrainingLoop:
    """Every rank makes it, and calls `go`."""

    def __init__(
        self,
        recipe: Recipe,
        manifest: Manifest,
        trainer: Trainer,
        console: Console,
        trace: bool,
        allotment: Allotment,
        cluster: Cluster,
    ) -> None:
        self._recipe, self._manifest, self._trainer = recipe, manifest, trainer
        self._comm, self._console = trainer.mesh.comm, console
        self._folder = Path(recipe.train.run)
        self._constants = RunConstants.read(manifest, recipe.to_dict(), self._comm)
        self._timing, self._trace = (
            StepTrace(trainer.mesh, trainer.plan, trainer.clock_offset),
            trace,
        )
        self._diary = HistoryWriter(self._folder, writes=self._comm.rank == 0)
        self._signals = allotment.signals
        # The ranks may have been told different ends, and one clock must do for all: rank 0's.
        self._deadline = self._comm.bcast(allotment.deadline(recipe.train.time_limit))
        times = (
            (self._deadline, last_save_seconds(self._folder))
            if self._comm.rank == 0
            else (None, None)
        )
        self._stopping = Stopping(allotment.signals, *times)
        self._job, self._cluster = allotment.job, cluster
        self._last_saved: Path | None = None
        self._done = 0

    def go(self, checkpoint: Checkpoint | None) -> None:
        """Train from the checkpoint, or from the beginning, to the last step. Raises StoppedError, on every rank, when
        the run was saved before that because somebody asked, or its time was up.
        """
        with self._signals.orderly() if self._signals else nullcontext():
            reason = self._go(checkpoint)
            # When any rank returns, the run's files are whole.
            patient_barrier(self._comm)
        if reason:
            raise StoppedError(
                f"{reason}; the run is saved as {self._last_saved}; --resume goes on from it"
            )

    def _go(self, checkpoint: Checkpoint | None) -> str:
        """Why the run stopped before its end; "" where it did not."""
        self._done, steps = self._restore(checkpoint), self._recipe.train.steps
        owed = self._owes_evaluation()
        if self._done >= steps and not owed:
            self._diary.ended("finished", self._done)
            self._console.say(
                f"{self._folder} is at step {self._done:,} of {steps:,}: nothing to do (raise train.steps to go on)"
            )
            return ""
        reason = self._go_on(steps, owed)
        self._timing.tell(self._console)
        if self._trace:
            self._timing.write(self._folder / TRACE, self._console)
        if not reason:
            self._console.say(
                f"finished: {self._last_saved}, {self._folder / METRICS}, {self._folder / PICTURE}"
            )
        return reason

    def _go_on(self, steps: int, owed: bool) -> str:
        """Step until the end, or until all agreed to stop: why, "" at the end. `owed`: an evaluation comes first."""
        record, reason = None, ""
        try:
            if self._comm.rank == 0:
                write_text(self._folder / RECIPE, write_recipe(self._recipe))
            self._diary.started(self._done, self._facts())
            check_same(self._trainer.weights.values(), self._trainer.mesh.axis("data"))
            writes = self._comm.rank == 0
            record = MetricsWriter(self._folder, self._done, writes, self._console)
            if owed:
                self._evaluate(record)
            with self._console.progress("train", steps, "steps", start=self._done) as progress:
                while self._done < steps and not reason:
                    reason = self._one_step(record, progress)
        except BaseException as failure:
            raised = self._with_last_saved(failure)
            with suppress(OSError):  # a full disk has its own reason to tell
                self._diary.ended("failed", self._done, str(failure) or type(failure).__name__)
            raise raised from failure
        else:
            # Before a picture is drawn: time may be short.
            self._diary.ended("stopped" if reason else "finished", self._done, reason)
        finally:
            if record is not None:
                record.close()
        return reason

    def _one_step(self, record: MetricsWriter, progress: Progress) -> str:
        """The next step and what is due after it; why all ranks stop now, else ""."""
        begun, settings = time.perf_counter(), self._recipe.train
        result = self._trainer.step(self._done, self._stopping.wish())
        self._done = done = self._done + 1
        tokens = settings.batch * self._recipe.model.context
        self._timing.add(result.spans, result.others, result.stats.bubble)
        record.add(_metrics(done, result, tokens))
        progress.advance(
            1, **{"loss": f"{result.loss:.4f}", "tokens/s": f"{tokens / result.seconds:,.0f}"}
        )
        last = done == settings.steps
        reason = "" if last else self._stopping.reason(result.stats.stops)
        if reason:
            reason = self._comm.bcast(reason)
        saving = self._save(tokens) if last or reason or _due(settings.save_every, done) else 0.0
        # Behind the save: an evaluation may take longer than there is time. What a stop leaves out, a resume makes up.
        if self._evaluation_is_due() and not reason:
            self._evaluate(record)
        self._stopping.stepped(time.perf_counter() - begun - saving)
        return reason

    def _evaluation_is_due(self) -> bool:
        settings = self._recipe.train
        return self._done == settings.steps or _due(settings.evaluate_every, self._done)

    def _owes_evaluation(self) -> bool:
        """Whether the run was ended between the save of this step and its evaluation. Every rank calls it."""
        if not (
            self._done
            and self._evaluation_is_due()
            and self._manifest.splits["validation"].n_tokens
        ):
            return False
        metrics = self._folder / METRICS
        return not on_root(
            self._comm,
            lambda: any(
                line["step"] == self._done and "validation_loss" in line
                for line in read_metrics(metrics)
            ),
        )

    def _evaluate(self, record: MetricsWriter) -> None:
        if not self._manifest.splits["validation"].n_tokens:
            return
        with open_split(self._recipe.data.path, "validation") as reader:
            quiet = Console(speaks=False)
            score = evaluate(self._trainer.model, reader, self._comm, quiet)
        record.add({"step": self._done, "validation_loss": score.loss})
        self._console.say(
            f"step {self._done:,}: validation loss {score.loss:.4f}, perplexity {score.perplexity:,.2f}"
        )

    def _save(self, step_tokens: int) -> float:
        """The seconds that it took."""
        begun = time.perf_counter()
        facts = {
            "step": self._done,
            "tokens": self._done * step_tokens,
            **self._constants.facts,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        folder = self._folder / CHECKPOINTS
        saved = save(folder, self._tensors(), facts, self._constants.texts, self._comm)
        self._last_saved, seconds = saved, time.perf_counter() - begun
        self._stopping.saved(seconds)
        if self._comm.rank == 0:
            self._diary.saved(
                self._done, saved, seconds, sum(path.stat().st_size for path in saved.iterdir())
            )
            prune(folder, self._recipe.train.keep)
        return seconds

    def _tensors(self) -> dict[str, torch.Tensor]:
        trainer = self._trainer
        return {
            **weight_tensors(trainer.weights),
            **slot_tensors(
                state_tensors(trainer.weights, trainer.optimizer, trainer.recipe.optimizer.slots)
            ),
        }

    def _restore(self, checkpoint: Checkpoint | None) -> int:
        """Fill weights and averages; return how many steps are done."""
        if checkpoint is None:
            return 0
        checkpoint.load(self._tensors())
        set_steps(self._trainer.optimizer, checkpoint.step)
        self._last_saved = checkpoint.folder
        self._console.say(f"going on from {checkpoint.folder}")
        return checkpoint.step

    def _facts(self) -> dict[str, Any]:
        """What the history tells of a start. Every rank calls it."""
        trainer, recipe = self._trainer, self._recipe
        hosts: dict[str, list[int]] = {}
        for rank, host in enumerate(self._comm.allgather(host_name())):
            hosts.setdefault(host, []).append(rank)
        cluster, schedule, sizes = self._cluster, trainer.plan.schedule, trainer.mesh.sizes
        return {
            "ranks": self._comm.size,
            "hosts": hosts,
            "mesh": trainer.mesh.describe(),
            "axes": sizes,
            "traffic": traffic_bytes(sizes, recipe.model, recipe.train.batch, schedule.chunks),
            "threads": torch.get_num_threads(),
            "steps": recipe.train.steps,
            "tokens_per_step": recipe.train.batch * recipe.model.context,
            "parameters": recipe.model.parameters,
            "mpi": cluster.mpi_name,
            "processor": cluster.cpu_model,
            "versions": {name: package_version(name) for name in PACKAGES}
            | {"python": platform.python_version()},
            "job": asdict(self._job) if self._job else None,
            "deadline": self._deadline,
        }

    def _with_last_saved(self, failure: BaseException) -> BaseException:
        """The same failure, telling the last good checkpoint, where it is one that a run may meet."""
        last = self._last_saved
        way_on = (
            f"the last good checkpoint is {last}; --resume goes on from it"
            if last
            else "no checkpoint was saved yet"
        )
        if isinstance(failure, DivergedError):
            return type(failure)(
                f"{failure}; {way_on}, perhaps with a lower optimizer.learning_rate"
            )
        if isinstance(failure, KeyboardInterrupt):
            return type(failure)(way_on)
        if isinstance(failure, OSError):
            place = failure.filename or self._folder
            return CheckpointError(
                f"{place}: {failure.strerror or failure}; mend that, and then: {way_on}"
            )
        return failure


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _metrics(step: int, result: StepResult, tokens: int) -> dict[str, float]:
    stats = result.stats
    waits = {
        "bubble": stats.bubble,
        **{f"{axis}_seconds": seconds for axis, seconds in stats.wait_seconds.items()},
    }
    return {
        "step": step,
        "loss": result.loss,
        "tokens": step * tokens,
        "tokens_per_second": tokens / result.seconds,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "step_seconds": result.seconds,
        "memory_bytes": stats.memory_bytes,
        **{name: value for name, value in waits.items() if value},
    }
