"""The batch of a step that the model writes itself: answers to prompts, with their advantages.

A rank writes the answers of its own rows. Prompts are a function of (seed, step), draws of the seed
and the number of the row in the run. So they are the same at any number of ranks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mpillm.comm.failure import on_all
from mpillm.errors import LayoutError, RecipeError
from mpillm.infer.chat_prompt import answer_ends
from mpillm.infer.decoding.prompts import Int64s, Questions
from mpillm.infer.decoding.sample_answers import SampledAnswer, sample_answers
from mpillm.infer.decoding.write_answers import write_answers
from mpillm.infer.loading import open_of
from mpillm.infer.sampling import Decoding, Sampling
from mpillm.models.linear_head import plain_outputs
from mpillm.models.part_module import Fields, PartModule
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.system.console import Console
from mpillm.tasks.answer_rewards.reward_catalog import AnswerRewards
from mpillm.tasks.grpo import GRPO, Written, advantages_of, alike, answer_fields, divergences
from mpillm.tasks.task_catalog import TaskSettings
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.order import permute
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.train.recipe import Recipe

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.tasks.metrics.metric import Array


@dataclass(frozen=True)
class WrittenBatch:
    """This rank's share of a step's answers, and what is recorded of all ranks'."""

    fields: list[Fields]
    """Of each microbatch."""
    figures: Mapping[str, float]


@dataclass(frozen=True)
class _Row:
    """What all ranks learn of an answer."""

    values: list[float]
    """By each reward."""
    total: float
    tokens: int
    ended: bool
    divergence: float
    """From the reference, the mean over its tokens; 0 without one."""


class Rollouts:
    """The answers that a run learns from, and those by which it is evaluated.

    Every rank makes it, and calls its methods together with the others.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: ShardedModel,
        manifest: Manifest,
        reader: PairReader,
        rewards: AnswerRewards,
        reference: PartModule | None,
    ) -> None:
        """`reader`: of the training split. `reference`: the weights at the start, where the loss
        has a divergence.

        Raises LayoutError where a rank lacks weights, UsageError for a model that cannot generate,
        RecipeError for prompts that leave no place for an answer.
        """
        assert isinstance(model.task, GRPO)
        if model.alike:
            raise LayoutError(
                "the ranks write answers of unequal lengths, and parallel.zero = "
                f"{recipe.parallel.zero} gathers the weights on all of them at once where they "
                "share no memory; take parallel.zero = 2"
            )
        self._settings: TaskSettings = recipe.task
        self._batch, self._seed = recipe.train.batch, recipe.train.seed
        self._task, self._model, self._comm = model.task, model, model.mesh.comm
        [self._part] = model.parts.values()
        # Before the first step: an architecture may have no cache.
        self._part.make_cache(1)
        self._manifest, self._reader, self._rewards = manifest, reader, rewards
        self._reference = reference
        self._tokenizer = manifest.load_tokenizer()
        self._ends = answer_ends(self._tokenizer, manifest.load_template())
        self._questions = self._questions_of(reader)
        check_prompts(self._questions, self._comm)
        if manifest.splits["validation"].n_tokens:
            with open_of(manifest, "validation") as held_out:
                assert isinstance(held_out, PairReader)
                check_prompts(self._questions_of(held_out), self._comm)

    def batch(self, step: int, first_row: int) -> WrittenBatch:
        """Write the answers of `step`; this rank has the rows from `first_row` on.

        Raises DataError on every rank for a reward that is not finite, CheckpointError where the
        outputs of the model are not finite.
        """
        bounds = self._model.plan.bounds

        def work() -> list[tuple[dict[str, Tensor], list[_Row]]]:
            with self._generating():
                return [self._written(step, first_row + a, first_row + b) for a, b in bounds]

        parts = on_all(self._comm, work)
        own = [row for _, rows in parts for row in rows]
        every = [row for rank in self._comm.allgather(own) for row in rank]
        rewards_N = np.array([row.total for row in every])
        advantages_N = advantages_of(rewards_N, self._settings.group)
        fields: list[Fields] = []
        for (made, _), (a, b) in zip(parts, bounds, strict=True):
            advantages_B1 = torch.from_numpy(advantages_N[first_row + a : first_row + b, None])
            fields.append({**made, "advantages": advantages_B1.to(self._model.device)})
        return WrittenBatch(fields, self._figures(every, rewards_N))

    def evaluate(self) -> dict[str, float]:
        """Answer the validation prompts, greedily; return the mean reward."""
        most = self._settings.answer_tokens
        decoding = Decoding(Sampling(most, temperature=0.0, top_k=0), most)
        with open_of(self._manifest, "validation") as reader, self._generating():
            assert isinstance(reader, PairReader)
            questions, quiet = self._questions_of(reader), Console(speaks=False)
            written = write_answers(self._part, questions, decoding, self._comm, quiet)

        def work() -> list[float]:
            asked = [(each.source, each.output, each.reference) for each in written]
            return [self._rewards.total(self._rewards.each(*each)) for each in asked]

        own = on_all(self._comm, work)
        return {"reward": _mean([value for part in self._comm.allgather(own) for value in part])}

    def _questions_of(self, reader: PairReader) -> Questions:
        settings, spec = self._settings, self._model.spec
        given = reader, self._task, spec, self._tokenizer, settings
        return Questions(*given, settings.answer_tokens, self._ends)

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """Let the model generate: without dropout."""
        self._part.eval()
        try:
            yield
        finally:
            self._part.train()

    def _written(self, step: int, first: int, last: int) -> tuple[dict[str, Tensor], list[_Row]]:
        """Write the rows `first` to `last` - 1 of a step, and reward them."""
        settings, questions = self._settings, self._questions
        samples_B = step * self._batch + np.arange(first, last, dtype=np.int64)
        numbers_B = prompt_numbers(samples_B // settings.group, len(questions), self._seed)
        sampling = Sampling(
            settings.answer_tokens, settings.temperature, 0, settings.top_p, self._seed
        )
        answers = sample_answers(self._part, questions, numbers_B, samples_B, sampling)
        written = [Written(each.prompt, each.ids, each.log_probs) for each in answers]
        fields = answer_fields(written, self._reader.form.padding)
        fields = {name: each.to(self._model.device) for name, each in fields.items()}
        divergences_B = [0.0] * len(answers)
        if self._reference is not None:
            fields["reference"] = self._reference_of(self._reference, fields)
            divergences_B = _divergences_of(fields)
        if settings.updates == 1:
            # The policy is the one that drew: its ratio is 1, without rounding.
            del fields["drawn"]
        given = zip(numbers_B.tolist(), answers, divergences_B, strict=True)
        return fields, [self._rewarded(*each) for each in given]

    def _rewarded(self, number: int, answer: SampledAnswer, divergence: float) -> _Row:
        question = self._questions.texts(number)
        text = self._tokenizer.decode(answer.ids[: len(answer.ids) - answer.ended]).strip()
        values = self._rewards.each(question.source, text, question.reference)
        total = self._rewards.total(values)
        return _Row(values, total, len(answer.ids), answer.ended, divergence)

    def _reference_of(self, reference: PartModule, fields: Fields) -> Tensor:
        # Not in inference mode: the loss reads it where gradients are recorded.
        with torch.no_grad():
            outputs = reference.forward_part(fields, ()).outputs
            read = outputs if self._task.reads_heads else plain_outputs(outputs)
            return self._task.log_probs(read, fields)

    def _figures(self, every: Sequence[_Row], rewards_N: "Array") -> dict[str, float]:
        """Return what is recorded of a step: means over all answers, summed exactly."""
        groups = alike(rewards_N.reshape(-1, self._settings.group))
        figures = {
            "reward": _mean([row.total for row in every]),
            "alike_groups": _mean(groups.astype(float).tolist()),
            "answer_tokens": _mean([float(row.tokens) for row in every]),
            "cut_answers": _mean([float(not row.ended) for row in every]),
        }
        if self._reference is not None:
            figures["kl"] = _mean([row.divergence for row in every])
        names = list(self._rewards.functions)
        if len(names) > 1:
            for place, name in enumerate(names):
                figures[f"reward_{name}"] = _mean([row.values[place] for row in every])
        return figures


def prompt_numbers(places: Int64s, count: int, seed: int) -> Int64s:
    """Return which of `count` prompts is at each place of the run: each epoch is a permutation."""
    epochs = places // count
    return permute(places - epochs * count, count, seed, epochs)


def check_prompts(questions: Questions, comm: "MPI.Intracomm") -> None:
    """Raise RecipeError where prompts and answers are longer than the context. Every rank calls
    it.
    """
    room, context = questions.room, questions.spec.context
    lengths = questions.lengths()
    # Only what is long with its answer can be long without it.
    long = np.flatnonzero(lengths > max(room, 0))[comm.rank :: comm.size].tolist()
    own = on_all(comm, lambda: [questions.prompt_tokens(number) for number in long])
    found = [tokens for part in comm.allgather(own) for tokens in part if tokens > room]
    if found:
        raise RecipeError(
            f"model.context = {context:,} leaves {max(room, 0):,} tokens for a prompt next to "
            f"task.answer_tokens = {questions.max_tokens:,}, and {len(found):,} of "
            f"{len(lengths):,} prompts of the {questions.reader.name} split are longer, up to "
            f"{max(found):,}; lower task.answer_tokens, raise model.context, or leave them out"
        )


def _divergences_of(fields: Mapping[str, Tensor]) -> list[float]:
    """Return the mean divergence of each answer's tokens from the reference."""
    counts_BT = fields["counts"]
    each_BT = divergences(fields["reference"] - fields["drawn"]).masked_fill(~counts_BT, 0.0)
    found: list[float] = (each_BT.sum(1) / counts_BT.sum(1)).tolist()
    return found


def _mean(values: Sequence[float]) -> float:
    # Rounded once: the order of ranks leaves no trace.
    return math.fsum(values) / len(values)
