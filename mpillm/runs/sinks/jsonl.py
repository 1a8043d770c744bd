"""metrics.jsonl: an object a line, the record that status, report and other programs read."""

import json
from pathlib import Path

from mpillm.runs.folder import METRICS
from mpillm.runs.metrics import Metrics, MetricsSink, read_metrics
from mpillm.system.atomic import write_text


class JsonlSink(MetricsSink):
    """Append a line a step, and flush it, so that `mpillm status` sees each step at once."""

    def open(self, run: Path, last_step: int) -> None:
        path = run / METRICS
        kept = [metrics for metrics in read_metrics(path) if metrics["step"] <= last_step]
        write_text(path, "".join(_line(metrics) for metrics in kept))
        self._file = path.open("a", encoding="utf-8")

    def add(self, metrics: Metrics) -> None:
        self._file.write(_line(metrics))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(metrics: Metrics) -> str:
    return json.dumps(metrics) + "\n"
