"""Write questions, answers and choices of records by the templates of a task file.

By the rules of lm-eval 0.4.13 (lm_eval/api/task.py). Templates run in Jinja's sandbox, since a task
file is code of others.
"""

import ast
import re
from functools import cache
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mpillm.errors import DataError, UsageError
from mpillm.infer.harness.task_file import Wording
from mpillm.infer.harness.task_records import Record, TaskRecords
from mpillm.system.messages import printable, some_of

# What is neither a template nor a text of several words.
NAME = re.compile(r"[A-Za-z_]\w*")


class RecordRenderer:
    """Writes texts of records by templates or names of columns. `place`: the file, for messages."""

    def __init__(self, place: str, records: TaskRecords) -> None:
        self._place = f"{place}, {records.place}"
        self._columns = records.columns

    def written(self, key: str, source: str, record: Record) -> Any:
        """Return the column `source` of a record, or what the template `source` writes.

        Raises DataError for a column that is not there, with those that are.
        """
        if source in self._columns:
            return record[source]
        if NAME.fullmatch(source):
            raise self._fault(f"{key} names the column {source!r}, which the data lacks")
        try:
            return _template(source).render(**record)
        except jinja2.UndefinedError as failure:
            raise self._fault(f"{key}: {printable(str(failure))}") from failure
        except jinja2.TemplateError as failure:
            words = printable(str(failure))
            raise UsageError(
                f"{self._place}: {key} is no template: {words}; correct it"
            ) from failure
        # A template computes with what a record holds, and may fail in any way.
        except (TypeError, ValueError, KeyError, ArithmeticError, re.error) as failure:
            raise self._fault(f"{key}: {type(failure).__name__}: {failure}") from failure

    def text(self, key: str, value: Any) -> str:
        """Return a value that must be a text. Raises DataError."""
        if not isinstance(value, str):
            raise self._fault(f"{key} gives {value!r:.80}, and not a text")
        return value

    def phrase(self, key: str, source: str, record: Record) -> str:
        """Write a description or a prefix: a single word that is no column is a text, too."""
        alone = NAME.fullmatch(source) and source not in self._columns
        return source if alone else self.text(key, self.written(key, source, record))

    def question(self, wording: Wording, record: Record) -> Any:
        """Return the question: a text, or a number, that of the right choice among contexts."""
        source = wording.doc_to_text
        found = self.written("doc_to_text", source, record)
        if source in self._columns or wording.doc_to_choice is None:
            return found
        return int(found) if found.isdigit() else found

    def target(self, wording: Wording, record: Record) -> Any:
        """Return the answer: a text, a number or a list, as the column or the template gives it."""
        source = wording.doc_to_target
        if not isinstance(source, str):
            return source
        found = self.written("doc_to_target", source, record)
        if source in self._columns:
            return found
        if found.isdigit() and wording.doc_to_choice is not None:
            return int(found)
        if len(found) > 1 and found[0] == "[" and found[-1] == "]":
            try:
                return ast.literal_eval(found)
            except (SyntaxError, ValueError):
                return found
        return found

    def choices(self, wording: Wording, record: Record) -> tuple[str, ...]:
        """Return the choices of a record. Raises DataError for none, and for an empty one."""
        found = source = wording.doc_to_choice
        if isinstance(source, dict):
            found = list(source.values())
        elif isinstance(source, str):
            found = self.written("doc_to_choice", source, record)
            if source not in self._columns:
                found = self._literal(found)
        if not isinstance(found, list) or not found:
            raise self._fault(
                f"doc_to_choice gives no choices, but {found!r:.80}, of {record!r:.200}"
            )
        if not all(isinstance(each, str) and each for each in found):
            raise self._fault(
                f"each choice must be a text, and not {found!r:.80}, of {record!r:.200}"
            )
        return tuple(found)

    def _literal(self, text: Any) -> Any:
        try:
            return ast.literal_eval(str(text))
        except (SyntaxError, ValueError) as failure:
            raise self._fault(f"doc_to_choice writes no list, but {text!r:.80}") from failure

    def _fault(self, what: str) -> DataError:
        return DataError(
            f"{self._place}: {what}; the columns are {some_of(self._columns, 20)}. Name one alone "
            "or in a template, as {{name}}; a text of one word is written {{'word'}}"
        )


def begun(question: str, prefix: str, delimiter: str) -> str:
    """Write a question with the beginning of its answer, apart by the delimiter."""
    if not prefix:
        return question
    return question + (delimiter if question and _are_joined(question, prefix) else "") + prefix


def solved(question: str, prefix: str, answer: str, delimiter: str) -> str:
    """Write a question with its answer, which may have a prefix."""
    if not answer:
        return begun(question, prefix, delimiter)
    if not prefix:
        return question + delimiter + answer
    return (
        begun(question, prefix, delimiter) + (" " if _are_joined(prefix, answer) else "") + answer
    )


def _are_joined(one: str, other: str) -> bool:
    """Return whether no white space parts two texts."""
    return not (one[-1].isspace() or other[0].isspace())


@cache
def _template(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@cache
def _environment() -> jinja2.Environment:
    """Make the harness's environment, in a sandbox."""

    def regex_replace(text: str, pattern: str, new: str, count: int = 0) -> str:
        return re.sub(pattern, new, text, count=count)

    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["regex_replace"] = regex_replace
    return environment
