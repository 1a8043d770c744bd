"""The training loop of a run: steps, evaluations, checkpoints, metrics, and an orderly stop."""

import gc
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mpillm.comm.failure import host_name, on_root
from mpillm.comm.waiting import patient_barrier
from mpillm.errors import CheckpointError, DivergedError, MismatchError, StoppedError
from mpillm.infer.loading import RunConstants, open_of
from mpillm.infer.scores.score_answers import evaluate_task
from mpillm.launch.current_job import CurrentJob
from mpillm.launch.signals import StopSignals
from mpillm.launch.walltime import seconds_of
from mpillm.machine.cluster_profile import Cluster
from mpillm.models.part_module import torch_explained
from mpillm.parallel.data.same_weights import check_same
from mpillm.parallel.step_plan import traffic_bytes
from mpillm.plan.gather_count import gathers_a_step
from mpillm.runs.folder import METRICS, PICTURE, RECIPE, TRACE
from mpillm.runs.history import HistoryWriter, Outcome, last_save_seconds
from mpillm.runs.metrics import MetricsWriter, read_metrics
from mpillm.system.atomic import make_folder, write_text
from mpillm.system.console import Console, Progress, binary_bytes
from mpillm.system.malloc import release_pages
from mpillm.system.messages import explain
from mpillm.system.versions import package_version
from mpillm.tokens.manifest import NAME as MANIFEST
from mpillm.tokens.manifest import Manifest
from mpillm.train.best_checkpoint import FROM_LOSS, LOSS, BestCheckpoint, recorded_name
from mpillm.train.hold import Hold
from mpillm.train.optimizers.optimizer import set_steps
from mpillm.train.recipe import Recipe, write_recipe
from mpillm.train.run_memory import RunMemory, compare_text, peak_memory_bytes
from mpillm.train.step import StepResult, Trainer
from mpillm.train.stopping import LOCK_LOST, Stopping
from mpillm.train.trace import StepTrace
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.names import name_tensors
from mpillm.weights.places import CHECKPOINTS, best_checkpoint, checkpoint_folders, step_of
from mpillm.weights.saving import check_replaceable, mark_best, prune, save
from mpillm.weights.slices import Held, all_finite, slices_of

PACKAGES = ("mpillm", "torch", "mpi4py", "h5py", "numpy")


@dataclass(frozen=True)
class JobLimits:
    """The limits that a job sets to a run, and the signals by which it asks the run to stop."""

    signals: StopSignals | None = None
    """None: no signal stops the run in an orderly way."""
    job: CurrentJob | None = None
    end: float | None = None
    """When the batch system ends the job, in unix seconds; None: not known."""
    started: float = 0.0
    """When the process started, in unix seconds: train.time_limit counts from there. 0: now."""

    def deadline(self, time_limit: str) -> float | None:
        """Return the earlier of the batch system's end and the recipe's limit, in unix seconds."""
        limits = [self.end] if self.end is not None else []
        if time_limit:
            limits.append((self.started or time.time()) + seconds_of(time_limit))
        return min(limits, default=None)


class TrainingLoop:
    """The steps of one run. Every rank makes it, and calls `run` once."""

    def __init__(
        self,
        recipe: Recipe,
        manifest: Manifest,
        constants: RunConstants,
        trainer: Trainer,
        console: Console,
        trace: bool,
        limits: JobLimits,
        cluster: Cluster,
        hold: Hold,
        memory: RunMemory,
    ) -> None:
        self._recipe, self._constants, self._trainer = recipe, constants, trainer
        self._comm, self._console = trainer.mesh.comm, console
        self._folder, self._hold = Path(recipe.train.run), hold
        self._memory = memory
        self._predicted = memory.predict(trainer.plan).total
        self._manifest = manifest
        self._validates = bool(manifest.splits["validation"].n_tokens)
        self._best = BestCheckpoint(recipe.train, trainer.model.task, self._validates)
        self._step_trace = StepTrace(trainer.mesh, trainer.plan, trainer.clock_offset)
        self._writes_trace = trace
        self._history = HistoryWriter(self._folder, writes=self._comm.rank == 0)
        self._signals = limits.signals
        # The batch system may give the ranks different ends. All stop by one clock: rank 0's.
        self._deadline = self._comm.bcast(limits.deadline(recipe.train.time_limit))
        times = (
            (self._deadline, last_save_seconds(self._folder))
            if self._comm.rank == 0
            else (None, None)
        )
        self._stopping = Stopping(limits.signals, *times)
        self._job, self._cluster = limits.job, cluster
        self._last_saved: Path | None = None
        # The steps of checkpoints that are known to be whole: restored, or saved here.
        self._good: set[int] = set()
        self._failure = ""
        self._done = 0
        # The step after which the dataset was last compared.
        self._checked_at = -1

    def run(self, checkpoint: Checkpoint | None) -> None:
        """Train from the checkpoint, or from the initial weights, to the last step.

        Raises StoppedError on every rank when a stop request or the time limit ended the run
        early; the run is saved then.
        """
        with self._signals.orderly() if self._signals else nullcontext():
            reason = self._run_from(checkpoint)
            # Rank 0 may still write files: no rank returns before they are complete.
            patient_barrier(self._comm)
        if reason:
            raise StoppedError(
                f"{reason}; the run is saved as {self._last_saved}; --resume continues it"
            )

    def _run_from(self, checkpoint: Checkpoint | None) -> str:
        """Restore, train, and write the trace; return why the run stopped early, else ""."""
        self._done, steps = self._restore(checkpoint), self._recipe.train.steps
        overdue = self._evaluation_is_missing()
        self._best.recall(self._folder / METRICS, self._done, self._comm)
        early = self._best.stops
        if (self._done >= steps or early) and not overdue:
            self._note(lambda: self._history.ended("finished", self._done, early))
            raised = "train.early_stopping_patience" if early else "train.steps"
            self._console.say(
                f"{self._folder} is at step {self._done:,} of {steps:,}: nothing to do "
                f"({early + '; ' if early else ''}raise {raised} to continue)"
            )
            return ""
        reason = self._run_steps(steps, overdue)
        self._step_trace.print_bubble(self._console)
        if self._writes_trace:
            trace = self._folder / TRACE
            self._note(lambda: self._step_trace.write_json(trace, self._console))
        if not reason:
            left = f"{self._last_saved}, {self._folder / METRICS}"
            if PICTURE in self._recipe.train.sinks:
                left += f", {self._folder / PICTURE}"
            early = f" ({self._best.stops})" if self._best.stops else ""
            self._console.say(f"finished{early}: {left}")
            best = best_checkpoint(self._folder / CHECKPOINTS)
            if best and self._best.step:
                self._console.say(f"the best checkpoint: {best}, {self._best.describe()}")
        return reason

    def _run_steps(self, steps: int, overdue: bool) -> str:
        """Step until `steps` are done or all ranks agree to stop; return why they stop, else "".

        `overdue`: the evaluation of the step that was restored comes first.
        """
        metrics, reason = None, ""
        try:
            on_root(self._comm, lambda: self._prepare_folder(steps))
            facts = self._facts()
            on_root(self._comm, lambda: self._history.started(self._done, facts))
            self._hold.on_failure = self._record_failure
            for weights, axis in self._trainer.model.replicas:
                check_same(weights, axis)
            metrics = self._open_metrics()
            if overdue and self._evaluate(metrics):
                self._mark_best()
            progress_bar = self._console.progress("train", steps, "steps", start=self._done)
            with progress_bar as progress, _few_objects():
                while self._done < steps and not (reason or self._best.stops):
                    with torch_explained():
                        reason = self._step_and_save(metrics, progress)
        except BaseException as failure:
            self._failure = str(failure) or type(failure).__name__
            # No picture: the ranks agree to fail within seconds. Nothing at all is written where
            # another job holds the run.
            if metrics is not None and not self._hold.is_lost():
                metrics.abandon()
            raise self._with_last_saved(failure) from failure
        # Before the picture is drawn: the job's time may end while matplotlib loads.
        self._hold.on_failure = None
        how: Outcome = "stopped" if reason else "finished"
        # Ahead of matplotlib, whose 20 MiB and more belong to rank 0 alone, and to no step.
        device = self._trainer.plan.precision.device
        measured = max(self._comm.allgather(peak_memory_bytes(device)))
        self._console.say(compare_text(self._predicted, measured))
        why = reason or self._best.stops
        self._note(lambda: self._history.ended(how, self._done, why, measured))
        metrics.close()
        return reason

    def _open_metrics(self) -> MetricsWriter:
        """Open the sinks on rank 0. Raises MpillmError on every rank where that fails."""
        made: list[MetricsWriter] = []

        def make() -> None:
            sinks = self._recipe.train.sinks
            made.append(MetricsWriter(self._folder, self._done, True, self._console, sinks))

        on_root(self._comm, make)
        return made[0] if made else MetricsWriter(self._folder, self._done, writes=False)

    def _note(self, work: Callable[[], None]) -> None:
        """Write a record of what is done and saved already: a failure is a warning.

        The failure of rank 0 alone would abort the job, and the checkpoint is worth more.
        """
        try:
            work()
        except OSError as failure:
            self._console.warn(f"a record of the run is incomplete: {explain(failure)}")

    def _check_data(self) -> None:
        """Raise MismatchError on every rank where the path holds another dataset by now.

        Once a step. Shards are opened when they are first read. One that is gone fails by itself.
        """
        if self._checked_at == self._done:
            return
        self._checked_at = self._done

        def check() -> None:
            folder = self._manifest.folder
            if not (folder / MANIFEST).is_file():
                return
            if Manifest.load(folder).manifest_hash != self._manifest.manifest_hash:
                raise MismatchError(
                    f"{folder} is another dataset now than the one that the run began with; "
                    "prepare another dataset in another folder while a run reads this one"
                )

        on_root(self._comm, check)

    def _prepare_folder(self, steps: int) -> None:
        """Write the recipe, and try what the first save will need. Raises MpillmError."""
        folder = self._folder / CHECKPOINTS
        make_folder(folder)
        for path in folder.iterdir():
            step = step_of(path)
            if step is not None and self._done < step <= steps:
                check_replaceable(path)
        if self._best.metric:
            mark_best(folder, self._best.step)
        held = (part for each in self._tensors(self._done).values() for part in slices_of(each))
        nbytes = sum(part.tensor.nbytes for part in held)
        free = shutil.disk_usage(folder).free
        if free < nbytes:
            self._console.warn(
                f"a checkpoint takes about {binary_bytes(nbytes)} and {folder} has "
                f"{binary_bytes(free)} free; free some space before the first save"
            )
        try:
            write_text(self._folder / RECIPE, write_recipe(self._recipe), plain=True)
        except OSError as failure:
            raise CheckpointError(explain(failure, self._folder / RECIPE)) from failure

    def _record_failure(self, failure: BaseException) -> None:
        """Write the end of a failed run on rank 0, once all ranks agree to fail."""
        # On a full disk the history cannot be written; the failure itself is more useful.
        with suppress(OSError):
            self._history.ended("failed", self._done, self._failure or str(failure))

    def _step_and_save(self, metrics: MetricsWriter, progress: Progress) -> str:
        """Run one step, then save and evaluate if due; return why all ranks stop now, else ""."""
        begin, settings = time.perf_counter(), self._recipe.train
        lost = self._hold.is_lost()
        request = LOCK_LOST if lost else self._stopping.stop_request()
        result = self._trainer.step(self._done, request)
        if LOCK_LOST in result.stats.stops:
            on_root(self._comm, self._hold.refuse_if_lost)
        self._done = done = self._done + 1
        if result.repeats:
            self._console.say(
                f"step {done:,}: gradients overflowed float16 {result.repeats} time(s); computed "
                f"again with a loss scale of {result.loss_scale:g}"
            )
        tokens = settings.batch * self._recipe.model.context
        self._step_trace.add(result.spans, result.others, result.stats.bubble)
        # Asked again: the job may have been suspended within the step.
        if not self._hold.is_lost():
            metrics.add(_metrics(done, result, tokens))
        shown = {"loss": result.loss, **{k: v for k, v in result.figures.items() if k == "reward"}}
        speed = {"tokens/s": f"{tokens / result.seconds:,.0f}"}
        progress.advance(1, **{name: f"{value:.4f}" for name, value in shown.items()}, **speed)
        last = done == settings.steps
        reason = "" if last else self._stopping.stop_reason(result.stats.stops)
        if reason:
            # Every rank has a reason, but rank 0 alone knows the time: its words count.
            reason = self._comm.bcast(reason)
        saves = last or reason or _due(settings.save_every, done)
        saving = self._save(tokens) if saves else 0.0
        # After the save: an evaluation may take longer than the job has time. A stop skips it,
        # and the resumed run makes up for it.
        if self._evaluation_is_due() and not reason:
            better = self._evaluate(metrics)
            if (better or self._best.stops) and not saves:
                saving = self._save(tokens)
            if better:
                self._mark_best()
        self._stopping.add_step_seconds(time.perf_counter() - begin - saving)
        return reason

    def _evaluation_is_due(self) -> bool:
        settings = self._recipe.train
        return self._done == settings.steps or _due(settings.evaluate_every, self._done)

    def _evaluation_is_missing(self) -> bool:
        """Return whether the run ended between the save of this step and its evaluation.

        Every rank calls it.
        """
        if not (self._done and self._evaluation_is_due() and self._validates):
            return False
        path = self._folder / METRICS
        return not on_root(
            self._comm,
            lambda: any(
                line["step"] == self._done and "validation_loss" in line
                for line in read_metrics(path)
            ),
        )

    def _mark_best(self) -> None:
        """Let the link lead to the best checkpoint, which is whole. Every rank calls it."""
        if self._comm.rank == 0:
            self._note(lambda: mark_best(self._folder / CHECKPOINTS, self._best.step))
            # The one that was the best until now may go.
            self._prune(self._folder / CHECKPOINTS)

    def _evaluate(self, metrics: MetricsWriter) -> bool:
        """Evaluate and record; return whether this is the best checkpoint. Every rank calls it."""
        if not self._validates:
            return False
        self._check_data()
        # Neither the steps' free memory nor the evaluation's counts for the peak of the other.
        release_pages()
        with open_of(self._manifest, "validation") as reader:
            if self._trainer.references is not None:
                self._trainer.references.give(reader)
            quiet = Console(speaks=False)
            score = evaluate_task(self._trainer.model, reader, self._comm, quiet)
        release_pages()
        if not math.isfinite(score.loss):
            raise DivergedError(
                f"the run diverged: after step {self._done:,} the validation loss is {score.loss}"
            )
        on_root(self._comm, self._hold.refuse_if_lost)
        # Perplexity and bits per byte follow from the loss: they are not recorded.
        own = {
            name: value
            for name, value in score.values.items()
            if name not in FROM_LOSS and value is not None
        }
        if self._trainer.rollouts is not None:
            own |= self._trainer.rollouts.evaluate()
        recorded = {recorded_name(name): value for name, value in own.items()}
        line = {"step": self._done, LOSS: score.loss, **recorded}
        metrics.add(line)
        text = "".join(f", {name} {value:.4f}" for name, value in own.items())
        # A squared error has no perplexity, nor has the loss of a pair of answers.
        if "mse" not in score.values and self._trainer.references is None:
            text = f", perplexity {score.perplexity:,.2f}{text}"
        self._console.say(f"step {self._done:,}: validation loss {score.loss:.4f}{text}")
        return self._best.add(line)

    def _check_finite(self) -> None:
        """Raise DivergedError on all ranks where a weight, or a state of it, is not finite."""
        own = (
            name
            for name, held in self._tensors(self._done).items()
            for part in slices_of(held)
            if not _is_sound(name, part.tensor)
        )
        # Each rank names its first; the first of all is the same text on every rank.
        if bad := [name for name in self._comm.allgather(next(own, "")) if name]:
            raise DivergedError(
                f"the run diverged: after step {self._done:,} the norm of {min(bad)} is not "
                "finite, so this step was not saved"
            )

    def _save(self, step_tokens: int) -> float:
        """Save a checkpoint; return the seconds that it took. Every rank calls it.

        Raises DivergedError where a number is not finite, and LostLockError where another job
        holds the run: nothing is saved then.
        """
        begin = time.perf_counter()
        on_root(self._comm, self._hold.refuse_if_lost)
        self._check_data()
        self._check_finite()
        facts = {
            "step": self._done,
            "tokens": self._done * step_tokens,
            **self._constants.facts,
            **self._trainer.loss_scale.facts(),
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        folder = self._folder / CHECKPOINTS
        texts, guard = self._constants.texts, self._hold.refuse_if_lost
        saved = save(folder, self._tensors(self._done), facts, texts, self._comm, guard)
        self._last_saved, seconds = saved, time.perf_counter() - begin
        self._good.add(self._done)
        self._stopping.add_save_seconds(seconds)
        if self._comm.rank == 0:
            self._note(lambda: self._record_save(saved, seconds))
        return seconds

    def _prune(self, folder: Path) -> None:
        for fault in prune(folder, self._recipe.train.keep, self._good, self._best.step):
            self._console.warn(f"an old checkpoint stays: {fault}")

    def _record_save(self, saved: Path, seconds: float) -> None:
        # The old ones go first: on a full disk that makes room for the record.
        self._prune(saved.parent)
        nbytes = sum(path.stat().st_size for path in saved.iterdir())
        self._history.saved(self._done, saved, seconds, nbytes)

    def _tensors(self, done: int) -> dict[str, Held]:
        """Return what a checkpoint of `done` steps holds."""
        plain, islands = self._plain_tensors(), self._trainer.islands
        plain |= self._trainer.frozen_tensors()
        return plain if islands is None else islands.tensors(plain, done)

    def _plain_tensors(self) -> dict[str, Held]:
        trainer = self._trainer
        return name_tensors(
            trainer.stepped,
            trainer.stepped,
            trainer.optimizer.state,
            trainer.recipe.optimizer.slots,
            trainer.held,
        )

    def _restore(self, checkpoint: Checkpoint | None) -> int:
        """Fill weights and averages; return how many steps are done."""
        if checkpoint is None:
            return 0
        frozen, islands = self._trainer.frozen_tensors(), self._trainer.islands
        plain = self._plain_tensors() | frozen
        if islands is None:
            checkpoint.load(plain)
        else:
            islands.load(checkpoint, plain)
        self._trainer.take_frozen(frozen)
        set_steps(self._trainer.optimizer, checkpoint.step * self._trainer.updates)
        self._trainer.restored(checkpoint.facts)
        self._last_saved = checkpoint.folder
        self._good.add(checkpoint.step)
        self._console.say(f"continuing from {checkpoint.folder}")
        return checkpoint.step

    def _facts(self) -> dict[str, Any]:
        """Gather what the history records of a start. Every rank calls it."""
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
            "traffic": traffic_bytes(
                sizes,
                recipe.model,
                recipe.train.batch,
                schedule.chunks,
                trainer.plan.precision,
                recipe.parallel,
                trainer.plan.microbatches,
                gathers_a_step(recipe.model, trainer.plan)
                if trainer.model.gradients.gathered
                else 0.0,
                trainer.plan.tuning,
            ),
            "threads": torch.get_num_threads(),
            "steps": recipe.train.steps,
            "tokens_per_step": recipe.train.batch * recipe.model.context,
            "parameters": recipe.model.parameters,
            "predicted_memory_bytes": self._predicted,
            "mpi": cluster.mpi_name,
            "processor": cluster.cpu_model,
            "versions": {name: package_version(name) for name in PACKAGES}
            | {"python": platform.python_version()},
            "job": asdict(self._job) if self._job else None,
            "deadline": self._deadline,
            "folder": str(Path.cwd()),
        }

    def _with_last_saved(self, failure: BaseException) -> BaseException:
        """Return the failure with the last good checkpoint in its message.

        Failures that point to a mistake of the program are returned as they are.
        """
        last = self._last_saved
        remedy = (
            f"the last good checkpoint is {last}; --resume continues from it"
            if last
            else "no checkpoint was saved yet"
        )
        if isinstance(failure, DivergedError):
            if last and step_of(last) == self._done:
                remedy = self._step_back(last)
            return type(failure)(
                f"{failure}; {remedy}, perhaps with a lower optimizer.learning_rate"
            )
        if isinstance(failure, KeyboardInterrupt):
            return type(failure)(remedy)
        if isinstance(failure, MemoryError):
            return MemoryError(str(failure), f"{self._memory.remedy(self._trainer.plan)}; {remedy}")
        if isinstance(failure, OSError):
            path = failure.filename or self._folder
            return CheckpointError(f"{path}: {failure.strerror or failure}; correct that; {remedy}")
        return failure

    def _step_back(self, last: Path) -> str:
        """Say how to continue where the weights of the newest checkpoint themselves diverge.

        The loss of the next step is theirs, and it is the same at each attempt.
        """
        folders = checkpoint_folders(last.parent)
        earlier = [path for step, path in folders.items() if step < self._done]
        there = f"from {earlier[-1]}" if earlier else "at step 1"
        return f"this comes from the weights in {last}: remove it, and --resume continues {there}"


@contextmanager
def _few_objects() -> Iterator[None]:
    """Leave out of garbage collection what exists by now: a pass over all modules takes 0.1 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _is_sound(name: str, tensor: torch.Tensor) -> bool:
    """Return whether a tensor is fit to be saved: a weight by its norm, its state by its sum.

    Squares of weights beyond 1e19 overflow float32, and so do their products: such a model gives
    no loss. The average of squared gradients may be that large.
    """
    if name.startswith("model/"):
        return bool(tensor.detach().norm().isfinite())
    return all_finite(tensor)


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
        **result.parts,
        "tokens": step * tokens,
        "tokens_per_second": tokens / result.seconds,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "step_seconds": result.seconds,
        "memory_bytes": stats.memory_bytes,
        **{name: value for name, value in waits.items() if value},
        **({"loss_scale": result.loss_scale} if result.loss_scale != 1.0 else {}),
        **({"repeats": result.repeats} if result.repeats else {}),
        **({} if result.noise_scale is None else {"noise_scale": result.noise_scale}),
        **result.figures,
    }
