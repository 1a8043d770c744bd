"""metrics.jsonl: an object a line, the record that status, report and other programs read."""

import itertools
import os
from pathlib import Path

from mpillm.errors import UsageError
from mpillm.runs.folder import METRICS
from mpillm.runs.metrics import Metrics, MetricsSink, read_metrics_log
from mpillm.system.atomic import write_text
from mpillm.system.json_text import to_json
from mpillm.system.messages import explain


class JsonlSink(MetricsSink):
    """Append a line a step, and flush it, so that `mpillm status` sees each step at once.

    Lines that a full disk refused are kept, and written ahead of the next one.
    """

    tries_again = True

    def open(self, run: Path, last_step: int) -> None:
        """Keep the lines up to `last_step`; raises UsageError where the file cannot be written.

        Lines that cannot be read stay in a copy of the file.
        """
        path = run / METRICS
        log = read_metrics_log(path)
        try:
            if log.failure:
                raise UsageError(f"cannot write metrics: {log.failure}; move it away")
            if log.faults:
                kept = _set_aside(path)
                self.notice = (
                    f"{log.note(str(path))} and left out from here on; the file as it was is {kept}"
                )
            lines = (_line(metrics) for metrics in log.objects if metrics["step"] <= last_step)
            write_text(path, "".join(lines), plain=True)
            # Without a buffer: what was written of a line, and what not, must be known.
            self._file, self._left = path.open("ab", buffering=0), b""
        except OSError as failure:
            raise UsageError(f"cannot write {path}: {explain(failure, path)}") from failure

    def add(self, metrics: Metrics) -> None:
        self._left += _line(metrics).encode()
        self._write()

    def close(self) -> None:
        try:
            self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        while self._left:
            self._left = self._left[self._file.write(self._left) :]


def _set_aside(path: Path) -> Path:
    """Give a damaged file a second name, which stays when the file itself is replaced."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.damaged-{number}")
        try:
            os.link(os.path.realpath(path), aside)
        except FileExistsError:
            continue
        except OSError:
            # A file system without hard links: the file is moved, and written again at once.
            Path(os.path.realpath(path)).rename(aside)
        return aside
    raise AssertionError


def _line(metrics: Metrics) -> str:
    return to_json(metrics) + "\n"
