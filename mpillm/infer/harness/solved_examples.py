"""Draw the solved examples ahead of a question, as lm-evaluation-harness draws them.

By the rules of lm-eval 0.4.13 (lm_eval/api/samplers.py). Draws follow each other in the order of
questions, so one rank makes all of them.
"""

from random import Random

from mpillm.errors import UsageError
from mpillm.infer.harness.record_renderer import RecordRenderer, solved
from mpillm.infer.harness.task_file import HarnessTask
from mpillm.infer.harness.task_records import Record, TaskRecords, read_split

# The harness's own.
SEED = 1234


class SolvedExamples:
    """The pool of records with answers. `asked`: those that are evaluated."""

    def __init__(self, task: HarnessTask, asked: TaskRecords) -> None:
        self._task, self._fewshot, self._random = task, task.fewshot, Random(SEED)
        self._pool = self._records(asked)
        self._renderer = RecordRenderer(str(task.path), self._pool)
        # The harness compares the two keys alone, and takes them as equal where both are missing.
        self._leaves_out = (task.fewshot.split or "") == task.splits["test_split"]

    def ahead_of(self, record: Record) -> str:
        """Write the solved examples ahead of the question `record`, which is none of them.

        Raises UsageError where there are too few.
        """
        drawn = self._drawn(record)
        if len(drawn) < self._fewshot.count:
            raise UsageError(
                f"{self._task.path}: num_fewshot is {self._fewshot.count}, and {self._pool.place} "
                f"has {len(self._pool.rows)} records to draw from; lower it"
            )
        return "".join(map(self._solved, drawn))

    def _records(self, asked: TaskRecords) -> TaskRecords:
        task = self._task
        if self._fewshot.samples:
            rows = [dict(each) for each in self._fewshot.samples]
            columns = tuple(dict.fromkeys(key for row in rows for key in row))
            return TaskRecords(rows, columns, "fewshot_config.samples")
        if task.fewshot_split == task.evaluated_split:
            return asked
        return read_split(task.data, task.fewshot_split, task.path.parent)

    def _drawn(self, record: Record) -> list[Record]:
        count, rows = self._fewshot.count, list(self._pool.rows)
        if self._fewshot.sampler == "first_n":
            return self._without(record, rows)[:count]
        asked = count + self._leaves_out
        if asked > len(rows):
            return []
        drawn = self._without(record, self._random.sample(rows, asked))[:count]
        others = self._without(record, rows)
        # Of equal records several may have been the question.
        short = len(drawn) < count <= len(others)
        return self._random.sample(others, count) if short else drawn

    def _without(self, record: Record, rows: list[Record]) -> list[Record]:
        return [each for each in rows if each != record] if self._leaves_out else rows

    def _solved(self, record: Record) -> str:
        wording, renderer = self._fewshot.wording, self._renderer
        question, answer = renderer.question(wording, record), renderer.target(wording, record)
        if wording.doc_to_choice is not None:
            choices = renderer.choices(wording, record)
            if isinstance(question, int) and 0 <= question < len(choices):
                question = choices[question]
            elif isinstance(answer, int) and 0 <= answer < len(choices):
                answer = choices[answer]
        if isinstance(answer, list) and answer:
            answer = answer[0]
        prefix = renderer.phrase("gen_prefix", wording.gen_prefix, record)
        text = solved(
            renderer.text("doc_to_text", question),
            prefix,
            renderer.text("doc_to_target", answer),
            wording.target_delimiter,
        )
        return text + (self._fewshot.delimiter if answer else "")
