"""The console: text, tables and progress on rank 0, for terminals and for batch logs."""

import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

import rich.box
import rich.console
import rich.progress
import rich.table
from rich.text import Text

from mpillm.system.messages import printable

# A batch log gets a line at intervals, not a bar redrawn ten times a second. The interval grows, so
# that a long run does not fill its log.
LOG_INTERVAL_SECONDS = 5.0
LONGEST_LOG_INTERVAL_SECONDS = 60.0
# A file or a pipe has no width: a table in it is as wide as its columns need, up to this.
LOG_COLUMNS = 240


class Progress:
    """A long piece of work: `advance` it, with the figures to watch."""

    def __init__(
        self, console: "Console", description: str, total: float, unit: str, start: float = 0
    ) -> None:
        self._console, self._description, self._unit = console, description, unit
        self._total, self._done, self._first = total, start, start
        self._figures = ""
        self._started = self._spoke = time.monotonic()
        self._said = ""

    def advance(self, amount: float = 1, **figures: str) -> None:
        """Record that `amount` more is done; `figures` (name=text) replace those shown before."""
        self._done += amount
        if figures:
            self._figures = "  ".join(f"{name} {text}" for name, text in figures.items())
        self._update()

    def _update(self) -> None:
        now = time.monotonic()
        interval = min(
            max(LOG_INTERVAL_SECONDS, (now - self._started) / 20), LONGEST_LOG_INTERVAL_SECONDS
        )
        if now - self._spoke >= interval:
            self._say(now)

    def _say(self, now: float) -> None:
        self._spoke = now
        line = self._line(now)
        if line != self._said:
            self._said = line
            self._console.say(line)

    def _line(self, now: float) -> str:
        done, total = f"{self._done:,.0f}", f"{self._total:,.0f}"
        rate = (self._done - self._first) / max(now - self._started, 1e-9)
        left = (
            f"  {clock((self._total - self._done) / rate)} left"
            if rate and self._done < self._total
            else ""
        )
        return f"{self._description} {done}/{total} {self._unit}  {self._figures}{left}".rstrip()

    def finish(self) -> None:
        self._say(time.monotonic())


class _Bar(Progress):
    """Progress on a terminal: a bar drawn by rich."""

    def __init__(
        self,
        console: "Console",
        rich_console: rich.console.Console,
        description: str,
        total: float,
        unit: str,
        start: float,
    ) -> None:
        super().__init__(console, description, total, unit, start)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}"),
            rich.progress.TextColumn("{task.fields[figures]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=rich_console,
        )
        self._task = self._bar.add_task(description, total=total, completed=int(start), figures="")
        self._bar.start()

    def _update(self) -> None:
        self._bar.update(self._task, completed=self._done, figures=self._figures)

    def finish(self) -> None:
        self._bar.stop()


class _Silent(Progress):
    def _update(self) -> None:
        pass

    def finish(self) -> None:
        pass


class Console:
    """A console that prints where `speaks` is true (rank 0), and is silent elsewhere."""

    def __init__(
        self, speaks: bool = True, stream: TextIO | None = None, watched: bool | None = None
    ) -> None:
        """`watched`: whether the stream ends at a terminal; None: the stream itself knows."""
        self.speaks = speaks
        self._stream = stream or sys.stdout
        self._out = rich.console.Console(
            file=self._stream, highlight=False, emoji=False, soft_wrap=True, force_terminal=watched
        )
        if not self._out.is_terminal:
            self._out.width = max(self._out.width, LOG_COLUMNS)

    @property
    def is_terminal(self) -> bool:
        """Whether colours are shown: where not, marks in the text do their work."""
        return self._out.is_terminal

    def say(self, text: str) -> None:
        if self.speaks:
            self._out.print(Text(printable(text)))

    def warn(self, text: str) -> None:
        if self.speaks:
            self.styled([("warning:", "yellow"), (f" {text}", "")])

    def styled(self, parts: Sequence[tuple[str, str]]) -> None:
        """Print a line of parts, each with rich's name of its style, "" for none."""
        if self.speaks:
            self._out.print(Text.assemble(*((printable(text), style) for text, style in parts)))

    def write(self, text: str) -> None:
        """Write text as it is, without a line end: for output that streams.

        A terminal gets no control characters; a file or a pipe gets every byte.
        """
        if self.speaks:
            self._stream.write(printable(text) if self._out.is_terminal else text)
            self._stream.flush()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table: text in the first column, figures in the others, aligned to the right."""
        if not self.speaks:
            return
        table = rich.table.Table(
            title=Text(printable(title)), box=rich.box.SIMPLE_HEAD, title_justify="left"
        )
        for index, column in enumerate(columns):
            table.add_column(Text(printable(column)), justify="right" if index else "left")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self._out.print(table, soft_wrap=False)

    def facts(self, title: str, facts: Mapping[str, str]) -> None:
        """Print a table of names and values, without a head."""
        if not self.speaks:
            return
        table = rich.table.Table(
            title=Text(printable(title)),
            box=rich.box.SIMPLE,
            show_header=False,
            title_justify="left",
        )
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in facts.items():
            table.add_row(Text(printable(name), "bold"), Text(printable(text)))
        self._out.print(table, soft_wrap=False)

    @contextmanager
    def progress(
        self, description: str, total: float, unit: str = "", start: float = 0
    ) -> Iterator[Progress]:
        """Show work of `total` `unit` while the block runs; `start` of it was done before."""
        progress: Progress
        if not self.speaks:
            progress = _Silent(self, description, total, unit, start)
        elif self._out.is_terminal:
            progress = _Bar(self, self._out, description, total, unit, start)
        else:
            progress = Progress(self, description, total, unit, start)
        try:
            yield progress
        finally:
            progress.finish()


def once_each(warn: Callable[[str], None]) -> Callable[[str], None]:
    """Return `warn` for messages of the form `fault; what is done instead`.

    Several users of one resource lack it for one reason, such as the buckets of gradients in a full
    /dev/shm: what is done instead is said once, with the first fault.
    """
    said: set[str] = set()

    def once(text: str) -> None:
        instead = text.rpartition("; ")[2]
        if instead not in said:
            said.add(instead)
            warn(text)

    return once


def table_text(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table as `Console.table` prints it, for a message of several lines."""
    stream = io.StringIO()
    Console(stream=stream, watched=False).table(title, columns, rows)
    lines = (line.rstrip() for line in stream.getvalue().splitlines())
    return "\n".join(line for line in lines if line)


def clock(seconds: float) -> str:
    """Write 75 as `1:15` and 7,500 as `2:05:00`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def counted(number: float, what: str) -> str:
    """Write 1 as `1 rank`, 3 as `3 ranks`, 2.5 as `2.5 ranks`."""
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def binary_bytes(count: float) -> str:
    """Write 1,536 as `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
