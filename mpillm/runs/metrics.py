"""The metrics of a run: an object a step, written to each sink of the catalogue and read back."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from mpillm.runs.sink_catalog import SINKS
from mpillm.system.console import Console
from mpillm.system.plugins import load_class

Metrics = dict[str, float]
INSTALL = "pip install 'mpillm[train]'"


class MetricsSink(ABC):
    """A place that metrics go to, on rank 0.

    A sink imports its package in `open`. Where the package is missing, ImportError leaves `open`,
    and the run continues without that sink.
    """

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
    """Write the metrics of a run to its sinks on rank 0; elsewhere (`writes` false) do nothing."""

    def __init__(
        self,
        run: Path,
        last_step: int,
        writes: bool,
        console: Console | None = None,
        sinks: Sequence[str] = tuple(SINKS),
    ) -> None:
        """Open the sinks, each a name of the catalogue or `package.module:Name`.

        Prints one line for each sink whose package is missing. Raises UsageError for an unknown
        sink and OSError where metrics.jsonl cannot be written.
        """
        self._sinks: list[MetricsSink] = []
        for name in sinks if writes else ():
            sink = load_class(name, SINKS, "metrics sink", MetricsSink)()  # type: ignore[type-abstract]
            try:
                sink.open(run, last_step)
            except ImportError as failure:
                (console or Console()).warn(f"{name} is not written: {failure}; {INSTALL}")
            else:
                self._sinks.append(sink)

    def add(self, metrics: Metrics) -> None:
        """Record one object: a step, or an evaluation (`step`, `validation_loss`)."""
        for sink in self._sinks:
            sink.add(metrics)

    def close(self) -> None:
        """Close every sink, in their order, even where one of them fails."""
        with ExitStack() as stack:
            # An ExitStack calls back the last first.
            for sink in reversed(self._sinks):
                stack.callback(sink.close)

    def abandon(self) -> None:
        """Release every sink after a failure, whose reason matters more than that of a sink."""
        for sink in self._sinks:
            with suppress(OSError):
                sink.abandon()


def read_metrics(path: Path) -> Iterator[Metrics]:
    """Yield the objects of a metrics file; skip a line that a crash cut short."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            yield json.loads(line)
