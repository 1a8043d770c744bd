"""The questions of a split of pairs: what a model reads to write an answer, and the references.

A question of `seq2seq` is a pair: its source. One of `chat` is a conversation up to its last
answer, so each conversation is scored once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mpillm.errors import DataError, UsageError
from mpillm.infer.generate import first_token
from mpillm.models.part_module import Fields
from mpillm.models.spec import ModelSpec
from mpillm.tasks.task import Task
from mpillm.tasks.task_catalog import TaskSettings
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.pairs.pair_reader import LARGEST, PairReader
from mpillm.tokens.samples import RowShape
from mpillm.tokens.tokenizer import Tokenizer

Int64s = np.ndarray[Any, np.dtype[np.int64]]
# Where no option says how long a text may be.
USUAL_TOKENS = 256


class Question(NamedTuple):
    """One question as texts."""

    source: str
    reference: str


class Prompts(NamedTuple):
    """What the model is given for some questions."""

    ids: list[list[int]]
    """The first tokens of each row."""
    source: Fields | None
    """What an encoder reads, a row each; None without one."""


@dataclass(frozen=True)
class Questions:
    """The questions of a split, numbered from 0. `max_tokens`: of each answer, which `ends` end."""

    reader: PairReader
    task: Task
    spec: ModelSpec
    tokenizer: Tokenizer
    settings: TaskSettings
    max_tokens: int
    ends: frozenset[int]

    def __len__(self) -> int:
        return self.reader.n_pairs

    @property
    def _reads_source(self) -> bool:
        return bool(self.spec.source_field)

    @property
    def _row(self) -> RowShape:
        return RowShape.of(self.task, Lengths.of(self.spec))

    @property
    def room(self) -> int:
        """The tokens of a prompt that leave room for an answer; the last one is never read."""
        return self.spec.context - self.max_tokens + 1

    def lengths(self) -> Int64s:
        """Return the length of each question, to batch alike ones: that of its first side."""
        return self.reader.lengths()

    def prompts(self, numbers: Int64s) -> Prompts:
        """Return what the model reads for the questions `numbers`. Raises DataError."""
        if not self._reads_source:
            asked = [self._asked(number)[0] for number in numbers.tolist()]
            return Prompts([ids[-self.room :].tolist() for ids in asked], None)
        fields = self.task.fields(self.reader.read(numbers, self._row))
        given = ("source", "frames", "source_lengths")
        source = {name: fields[name] for name in given if name in fields}
        if "source" in source:
            # Padding of a batch of short sources would be most of the work.
            source["source"] = source["source"][:, : max(1, int(source["source_lengths"].max()))]
        start = first_token(self.spec, self.tokenizer.vocabulary, self.settings)
        return Prompts([[start]] * len(numbers), source)

    def describe_cuts(self) -> str:
        """Say how many questions are longer than the model reads; "" for none."""
        if self._reads_source:
            # A reference is whole, whatever the model can write.
            lengths = Lengths(LARGEST, self.spec.source_context)
            return self.reader.describe_cuts(replace(self._row, lengths=lengths))
        cut = sum(len(self._asked(number)[0]) > self.room for number in range(len(self)))
        return (
            f"cut off: of {cut:,} of {len(self):,} questions only the last {self.room:,} tokens "
            f"are read, which leaves room for an answer of {self.max_tokens:,}; lower --max-tokens"
            if cut
            else ""
        )

    def prompt_tokens(self, number: int) -> int:
        """Count the tokens of a conversation ahead of its last answer. Raises DataError."""
        return len(self._asked(number)[0])

    def texts(self, number: int) -> Question:
        """Return a question and its reference as texts. Raises DataError."""
        if self._reads_source:
            source, reference = self.reader.sides(number)
        else:
            source, reference = self._asked(number)
        is_sound = self.spec.source_field not in ("", "source")
        asked = f"sound of {len(source):,} frames" if is_sound else self.tokenizer.decode(source)
        return Question(asked.strip(), self.tokenizer.decode(reference).strip())

    def _asked(self, number: int) -> tuple[Any, Any]:
        """Return the ids of a conversation ahead of its last answer, and those of the answer."""
        ids, learnt = self.reader.conversation(number)
        given = np.flatnonzero(learnt == 0)
        # All that follows the last token which is not learnt.
        start = int(given[-1]) + 1 if len(given) else 0
        if not 0 < start < len(ids):
            raise DataError(
                f"conversation {number:,} of {self.reader.manifest.folder} has no answer after a "
                "question; prepare the dataset again"
            )
        return ids[:start], ids[start:]


def answer_tokens(spec: ModelSpec, max_tokens: int | None) -> int:
    """Return how many tokens an answer may have. Raises UsageError beyond the context."""
    context = spec.context
    if max_tokens is None:
        # A decoder's context holds the question, too.
        return min(USUAL_TOKENS, context if spec.source_field else max(1, context // 2))
    if max_tokens > context:
        raise UsageError(
            f"--max-tokens {max_tokens:,} is beyond the model's context of {context:,} tokens; "
            f"give {context:,} at most"
        )
    return max_tokens


def check_writes(tasks: Sequence[Task]) -> None:
    """Raise UsageError for a task whose answers are no texts with references."""
    for task in tasks:
        if not task.text_metrics:
            raise UsageError(
                f"--generate compares texts with references, and the data of the task {task.name} "
                "has none; it is for seq2seq (translation, summaries) and chat"
            )
