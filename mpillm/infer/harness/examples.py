"""The questions of a task: what the model is asked of each record, and what is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpillm.errors import DataError
from mpillm.infer.harness.record_renderer import RecordRenderer, begun
from mpillm.infer.harness.solved_examples import SolvedExamples
from mpillm.infer.harness.task_file import HarnessTask
from mpillm.infer.harness.task_records import Record, read_split
from mpillm.system.messages import some_of


@dataclass(frozen=True)
class Example:
    """A question. `requests`: (context, continuation), (text,) of a rolling one, or (context,)."""

    number: int
    record: Record
    requests: tuple[tuple[str, ...], ...]
    right: tuple[Any, ...] = ()
    """The numbers of the right choices, or the texts that are right."""
    choices: tuple[str, ...] = ()


def make_examples(task: HarnessTask, limit: int | None) -> list[Example]:
    """Read the data of a task and write its questions, the first `limit` of them.

    Raises UsageError and DataError, with the file and the record.
    """
    records = read_split(task.data, task.evaluated_split, task.path.parent)
    renderer = RecordRenderer(str(task.path), records)
    solved = SolvedExamples(task, records) if task.fewshot.count else None
    found = []
    for number, record in enumerate(records.rows[:limit]):
        start = renderer.phrase("description", task.description, record)
        start += solved.ahead_of(record) if solved is not None else ""
        found.append(_Asking(task, renderer, number, record, start).example())
    return found


@dataclass(frozen=True)
class _Asking:
    """A record, with the text ahead of its question."""

    task: HarnessTask
    renderer: RecordRenderer
    number: int
    record: Record
    start: str

    def example(self) -> Example:
        wording, kind = self.task.wording, self.task.output_type
        target = self.renderer.target(wording, self.record)
        if kind == "loglikelihood_rolling":
            return self._made(((self.renderer.text("doc_to_target", target),),), ())
        if kind == "multiple_choice":
            return self._of_choices(target)
        question = self.renderer.question(wording, self.record)
        context = self._context(self.renderer.text("doc_to_text", question))
        if kind == "loglikelihood":
            text = self.renderer.text("doc_to_target", target)
            return self._made(((context, text),), (text,))
        return self._made(((context,),), self._right_texts(target))

    def _of_choices(self, target: Any) -> Example:
        wording = self.task.wording
        choices = self.renderer.choices(wording, self.record)
        question = self.renderer.question(wording, self.record)
        if isinstance(question, int):
            # The choices are contexts of one continuation, as of Winogrande.
            ending = f"{wording.target_delimiter}{target}"
            requests = tuple((self._context(choice), ending) for choice in choices)
            return self._made(requests, self._right_choices(question, choices), choices)
        context = self._context(self.renderer.text("doc_to_text", question))
        endings = [f"{wording.target_delimiter}{choice}" for choice in choices]
        requests = tuple((context, ending) for ending in endings)
        return self._made(requests, self._right_choices(target, choices), choices)

    def _made(
        self,
        requests: tuple[tuple[str, ...], ...],
        right: tuple[Any, ...],
        choices: tuple[str, ...] = (),
    ) -> Example:
        return Example(self.number, self.record, requests, right, choices)

    def _context(self, question: str) -> str:
        wording = self.task.wording
        prefix = self.renderer.phrase("gen_prefix", wording.gen_prefix, self.record)
        return self.start + begun(question, prefix, wording.target_delimiter)

    def _right_choices(self, target: Any, choices: Sequence[str]) -> tuple[int, ...]:
        """Return the numbers of the right choices. Raises DataError for one that is not there.

        The harness warns of such an example alone, and counts it as wrong.
        """
        found = []
        for each in target if isinstance(target, list) else [target]:
            place: Any = each
            if isinstance(each, str):
                place = choices.index(each) if each in choices else None
            elif isinstance(each, float) and each.is_integer():
                place = int(each)
            if not isinstance(place, int) or not 0 <= place < len(choices):
                raise DataError(
                    f"{self.task.path}: the target of example {self.number:,} is {each!r:.80}, "
                    f"which is none of its {len(choices)} choices "
                    f"({some_of(map(repr, choices))}), nor a number from 0 to {len(choices) - 1}; "
                    "correct the data or doc_to_target"
                )
            found.append(int(place))
        return tuple(found)

    def _right_texts(self, target: Any) -> tuple[str, ...]:
        wording = self.task.wording
        if wording.doc_to_choice is not None:
            choices = self.renderer.choices(wording, self.record)
            return tuple(choices[each] for each in self._right_choices(target, choices))
        return tuple(map(str, target)) if isinstance(target, list) else (str(target),)
