"""A run from its recipe to its last checkpoint."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpillm.comm.agreement import on_root
from mpillm.comm.patience import patient_barrier
from mpillm.comm.profile import ClusterProfile, describe_cluster, load_profile
from mpillm.console import Console, Progress
from mpillm.errors import DivergedError, MismatchError, UsageError
from mpillm.files import make_folder, write_text
from mpillm.infer.evaluate import evaluate
from mpillm.infer.loading import TOKENIZER, weight_tensors
from mpillm.models.config import DecoderConfig
from mpillm.pages import keep_pages
from mpillm.parallel.data import check_same, share_batch
from mpillm.parallel.layout import make_mesh, plan_layout
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.order import WindowOrder
from mpillm.tokens.reader import open_split
from mpillm.train.optimizer import optimizer_tensors, set_steps
from mpillm.train.overview import tell_plan
from mpillm.train.recipe import Recipe, write_recipe
from mpillm.train.record import CLUSTER, METRICS, RECIPE, TRACE, Record
from mpillm.train.timing import Timing
from mpillm.train.trainer import StepResult, Trainer
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.finding import CHECKPOINTS, newest_whole
from mpillm.weights.saving import prune, save

if TYPE_CHECKING:
    from mpi4py import MPI


def train(recipe: Recipe, comm: "MPI.Intracomm", console: Console, resume: bool = False, trace: bool = False) -> None:
    """Train as the recipe says. Every rank calls it.

    `resume`: go on from the newest whole checkpoint of the run, if it has one. `trace`: leave a file that shows when
    each rank did what. Raises MpillmError's kinds.
    """
    keep_pages()
    manifest = Manifest.load(recipe.data.path)
    recipe = replace(recipe, model=_with_vocabulary(recipe, manifest))
    settings, parallel = recipe.train, recipe.parallel
    mesh = make_mesh(comm, parallel, recipe.model, settings.batch)
    data = mesh.axis("data")
    _, rows = share_batch(settings.batch, data)
    layout = plan_layout(recipe.model, parallel, data.size, rows, settings.microbatch, settings.fixed_order)
    with open_split(recipe.data.path, "train") as reader:
        # Refused before the run has a folder: a dataset that is shorter than one context, a profile that is missing.
        WindowOrder(reader.n_tokens, recipe.model.context, settings.seed)
        profile = _profile(recipe, comm, console)
        checkpoint = _place(recipe, manifest, comm, console, resume)
        tell_plan(recipe, mesh, layout, reader, console)
        trainer = Trainer(recipe, reader, mesh, layout, profile, console.warn)
        if data.size > 1:
            console.say(f"gradients: {trainer.describe()}")
        if layout.schedule.ranks > 1:
            console.say(f"stages: {trainer.describe_pipeline()}")
        run = Run(recipe, manifest, trainer, console, trace)
        run.go(checkpoint)
        trainer.close()


def _profile(recipe: Recipe, comm: "MPI.Intracomm", console: Console) -> ClusterProfile | None:
    """The cluster's profile: the recipe's, else one that lies in the run's folder, else none. Every rank calls it."""
    beside = Path(recipe.train.run) / CLUSTER
    here = describe_cluster(comm)
    named = Path(recipe.parallel.profile) if recipe.parallel.profile else None

    def load() -> ClusterProfile | None:
        path = named or (beside if beside.exists() else None)
        return load_profile(path, console.warn, here) if path else None

    return on_root(comm, load)


def _with_vocabulary(recipe: Recipe, manifest: Manifest) -> DecoderConfig:
    """The model's settings with the vocabulary of the data."""
    wanted, found = recipe.model.vocab_size, manifest.vocab_size
    if wanted and wanted < found:
        raise MismatchError(
            f"model.vocab_size = {wanted:,} is smaller than the {found:,} of the data {recipe.data.path}; "
            f"leave it out to take the data's"
        )
    return replace(recipe.model, vocab_size=wanted or found)


def _place(
    recipe: Recipe, manifest: Manifest, comm: "MPI.Intracomm", console: Console, resume: bool
) -> Checkpoint | None:
    """Make the run's folder, or find where the run stands. Every rank calls it."""
    folder = Path(recipe.train.run)
    make_folder(folder)
    if not resume:
        if comm.bcast((folder / METRICS).exists() or (folder / CHECKPOINTS).exists()):
            raise UsageError(f"{folder} holds a run already; --resume goes on with it, or name another train.run")
        return None
    checkpoint = newest_whole(folder, comm, console)
    if checkpoint is None:
        console.say(f"{folder} has no checkpoint yet: beginning at step 1")
        return None
    _check_same_run(recipe, manifest, checkpoint)
    return checkpoint


def _check_same_run(recipe: Recipe, manifest: Manifest, checkpoint: Checkpoint) -> None:
    """A run goes on with the model, the order and the data that it began with."""
    before, now = checkpoint.facts["recipe"], recipe.to_dict()
    changes = [
        f"{section}.{key} was {before[section].get(key)!r} and is {value!r}"
        for section, keys in (("model", now["model"]), ("train", {"seed", "batch"}))
        for key in keys
        if before[section].get(key) != (value := now[section][key])
    ]
    if checkpoint.facts["data"] != manifest.manifest_hash:
        changes.append(f"the data {recipe.data.path} is another dataset than the run began with")
    if changes:
        raise MismatchError(
            f"--resume goes on with the same model, order and data, but {'; '.join(changes)}; "
            f"mend the recipe, or name another train.run"
        )


class Run:
    """A run under way."""

    def __init__(
        self, recipe: Recipe, manifest: Manifest, trainer: Trainer, console: Console, trace: bool = False
    ) -> None:
        self._recipe, self._manifest, self._trainer = recipe, manifest, trainer
        self._comm, self._console = trainer.mesh.comm, console
        self._folder = Path(recipe.train.run)
        self._timing, self._trace = Timing(trainer.mesh, trainer.layout, trainer.clock_offset), trace
        self._last_saved: Path | None = None

    def go(self, checkpoint: Checkpoint | None) -> None:
        """Train from the checkpoint, or from the beginning, to the last step."""
        done, steps = self._restore(checkpoint), self._recipe.train.steps
        if done >= steps:
            self._console.say(
                f"{self._folder} is at step {done:,} of {steps:,}: nothing to do (raise train.steps to go on)"
            )
            return
        if self._comm.rank == 0:
            write_text(self._folder / RECIPE, write_recipe(self._recipe))
        check_same(self._trainer.weights.values(), self._trainer.mesh.axis("data"))
        record = Record(self._folder, done, writes=self._comm.rank == 0)
        try:
            with self._console.progress("train", steps, "steps", start=done) as progress:
                for step in range(done, steps):
                    self._one_step(step, record, progress)
        except (DivergedError, KeyboardInterrupt) as failure:
            raise self._with_last_saved(failure) from failure
        finally:
            record.draw()
            record.close()
        self._timing.tell(self._console)
        if self._trace:
            self._timing.write(self._folder / TRACE, self._console)
        # When any rank returns, the run's files are whole.
        patient_barrier(self._comm)
        self._console.say(f"finished: {self._last_saved}, {self._folder / METRICS}, {self._folder / 'loss.png'}")

    def _one_step(self, step: int, record: Record, progress: Progress) -> None:
        result = self._trainer.step(step)
        tokens = self._recipe.train.batch * self._recipe.model.context
        self._timing.add(result.spans, result.others, result.bubble)
        record.add(_metrics(step + 1, result, tokens))
        progress.advance(1, **{"loss": f"{result.loss:.4f}", "tokens/s": f"{tokens / result.seconds:,.0f}"})
        settings, done = self._recipe.train, step + 1
        last = done == settings.steps
        if last or (settings.evaluate_every and done % settings.evaluate_every == 0):
            self._evaluate(done, record)
        if last or (settings.save_every and done % settings.save_every == 0):
            self._save(done, tokens)

    def _evaluate(self, done: int, record: Record) -> None:
        if not self._manifest.splits["validation"].n_tokens:
            return
        with open_split(self._recipe.data.path, "validation") as reader:
            quiet = Console(speaks=False)
            score = evaluate(self._trainer.model, reader, self._comm, quiet)
        record.add({"step": done, "validation_loss": score.loss})
        self._console.say(f"step {done:,}: validation loss {score.loss:.4f}, perplexity {score.perplexity:,.2f}")

    def _save(self, done: int, step_tokens: int) -> None:
        facts = {
            "step": done,
            "tokens": done * step_tokens,
            "seed": self._recipe.train.seed,
            "recipe": self._recipe.to_dict(),
            "data": self._manifest.manifest_hash,
            "tokenizer": dict(self._manifest.tokenizer),
            "versions": {"torch": torch.__version__},
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        tokenizer = self._manifest.load_tokenizer()
        folder = self._folder / CHECKPOINTS
        self._last_saved = save(folder, self._tensors(), facts, {TOKENIZER: tokenizer.to_json()}, self._comm)
        if self._comm.rank == 0:
            prune(folder, self._recipe.train.keep)

    def _tensors(self) -> dict[str, torch.Tensor]:
        trainer = self._trainer
        return {**weight_tensors(trainer.weights), **optimizer_tensors(trainer.weights, trainer.optimizer)}

    def _restore(self, checkpoint: Checkpoint | None) -> int:
        """Fill weights and averages; return how many steps are done."""
        if checkpoint is None:
            return 0
        checkpoint.load(self._tensors())
        set_steps(self._trainer.optimizer, checkpoint.step)
        self._last_saved = checkpoint.folder
        self._console.say(f"going on from {checkpoint.folder}")
        return checkpoint.step

    def _with_last_saved(self, failure: BaseException) -> BaseException:
        """The same failure, telling the last good checkpoint."""
        last = self._last_saved
        way_on = (
            f"the last good checkpoint is {last}; --resume goes on from it" if last else "no checkpoint was saved yet"
        )
        text = f"{failure}; {way_on}" if str(failure) else way_on
        if isinstance(failure, DivergedError):
            text += ", perhaps with a lower optimizer.learning_rate"
        return type(failure)(text)


def _metrics(step: int, result: StepResult, tokens: int) -> dict[str, float]:
    bubble = {"bubble": result.bubble} if result.bubble else {}
    return {
        "step": step,
        "loss": result.loss,
        "tokens": step * tokens,
        "tokens_per_second": tokens / result.seconds,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "step_seconds": result.seconds,
        **bubble,
    }
