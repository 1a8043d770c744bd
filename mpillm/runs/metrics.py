"""The metrics of a run: an object a step, written to each sink of the catalogue and read back."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from mpillm.errors import MpillmError
from mpillm.runs.sink_catalog import DEFAULT, LINES, SINKS
from mpillm.system.console import Console
from mpillm.system.extras import EXTRA_OF, install_command
from mpillm.system.json_lines import JsonLines, read_json_lines, real_number, whole_number
from mpillm.system.messages import explain
from mpillm.system.plugins import load_class

Metrics = dict[str, float]


class MetricsSink(ABC):
    """A place that metrics go to, on rank 0.

    A sink imports its package in `open`. Where the package is missing, ImportError leaves `open`,
    and the run continues without that sink. Any other failure costs the sink alone, too.
    """

    tries_again: ClassVar[bool] = False
    """Whether a failed `add` is reported once and the next one is tried all the same."""

    notice = ""
    """A line to print after `open`; "" for none."""

    @abstractmethod
    def open(self, run: Path, last_step: int) -> None:
        """Begin at the step after `last_step`, in the folder `run`.

        An earlier attempt may have recorded steps beyond `last_step`: they no longer hold.
        """

    @abstractmethod
    def add(self, metrics: Metrics) -> None:
        """Record one object: a step, or an evaluation (`step`, `validation_loss`)."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left, and release files."""

    def abandon(self) -> None:
        """Release files after a failure: quickly, for other ranks wait. A picture is not drawn."""
        self.close()


class MetricsWriter:
    """Write the metrics of a run to its sinks on rank 0; elsewhere (`writes` false) do nothing.

    Metrics are an aid: a sink that fails is reported once, and the run continues. It is left out
    unless it `tries_again`.
    """

    def __init__(
        self,
        run: Path,
        last_step: int,
        writes: bool,
        console: Console | None = None,
        sinks: Sequence[str] = DEFAULT,
    ) -> None:
        """Open metrics.jsonl and `sinks`, each a name of the catalogue or `package.module:Name`.

        Prints one line for each sink whose package is missing. Raises UsageError for an unknown
        sink, and where metrics.jsonl cannot be written.
        """
        self._console = console or Console()
        self._sinks: dict[str, MetricsSink] = {}
        self._warned: set[str] = set()
        # A picture is drawn from the lines of metrics.jsonl, which is closed first.
        for name in dict.fromkeys((LINES, *sinks)) if writes else ():
            sink = load_class(name, SINKS, "metrics sink", MetricsSink)()  # type: ignore[type-abstract]
            try:
                sink.open(run, last_step)
            except ImportError as failure:
                package = (failure.name or "").partition(".")[0]
                remedy = f"; {install_command(package)}" if package in EXTRA_OF else ""
                self._console.warn(f"{name} is not written: {failure}{remedy}")
            except MpillmError:
                raise
            except Exception as failure:  # whatever its package raises
                self._give_up(name, failure)
            else:
                self._sinks[name] = sink
            if sink.notice:
                self._console.warn(sink.notice)

    def add(self, metrics: Metrics) -> None:
        """Record one object: a step, or an evaluation (`step`, `validation_loss`)."""
        for name, sink in list(self._sinks.items()):
            try:
                sink.add(metrics)
            except Exception as failure:  # whatever its package raises
                if not sink.tries_again:
                    del self._sinks[name]
                    self._give_up(name, failure)
                elif name not in self._warned:
                    self._warned.add(name)
                    self._console.warn(
                        f"{name} cannot be written: {_reason(failure)}; each step tries again"
                    )

    def close(self) -> None:
        """Close every sink, in their order, even where one of them fails."""
        for name, sink in self._sinks.items():
            try:
                sink.close()
            except Exception as failure:  # whatever its package raises
                self._give_up(name, failure)
        self._sinks = {}

    def abandon(self) -> None:
        """Release every sink after a failure, whose reason matters more than that of a sink."""
        for sink in self._sinks.values():
            with suppress(Exception):
                sink.abandon()
        self._sinks = {}

    def _give_up(self, name: str, failure: Exception) -> None:
        self._console.warn(f"{name} is not written from here on: {_reason(failure)}")


def _reason(failure: Exception) -> str:
    if isinstance(failure, OSError):
        return explain(failure)
    return f"{type(failure).__name__}: {failure}"


def read_metrics(path: Path) -> Iterator[Metrics]:
    """Yield the objects of a metrics file, as far as they can be read; each has a `step`."""
    yield from read_metrics_log(path).objects


def read_metrics_log(path: Path) -> JsonLines:
    """Read a metrics file: numbers alone, NaN for null, and steps that never go back."""
    log = read_json_lines(path)
    found, faults = [], log.faults
    for line in log.objects:
        numbers = _numbers(line)
        faults += numbers is None or numbers.keys() != line.keys()
        if numbers is not None:
            found.append(numbers)
    ordered = _in_order(found)
    return replace(log, objects=tuple(ordered), faults=faults + len(found) - len(ordered))


def _numbers(line: dict[str, Any]) -> Metrics | None:
    """Keep the numbers of a line; None where it has no step."""
    step = whole_number(line.get("step"))
    if step is None:
        return None
    values = {key: real_number(value) for key, value in line.items()}
    return {key: value for key, value in values.items() if value is not None} | {"step": step}


def _in_order(lines: list[Metrics]) -> list[Metrics]:
    """Keep the longest selection of lines whose steps never go back (patience sorting).

    So one damaged number costs its own line, be it too small or too large.
    """
    steps = [line["step"] for line in lines]
    if all(first <= second for first, second in pairwise(steps)):
        return lines
    # Of the selections of each length: the last step of the one that ends lowest, and its line.
    ends: list[float] = []
    places: list[int] = []
    previous: list[int] = []
    for index, step in enumerate(steps):
        length = bisect_right(ends, step)
        previous.append(places[length - 1] if length else -1)
        ends[length : length + 1] = [step]
        places[length : length + 1] = [index]
    chosen, index = [], places[-1]
    while index >= 0:
        chosen.append(lines[index])
        index = previous[index]
    return chosen[::-1]
