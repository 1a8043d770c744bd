"""TensorBoard's event files, by its own writer: torch's wrapper of it takes a second to load."""

import time
from pathlib import Path

from mpillm.runs.folder import EVENTS
from mpillm.runs.metrics import Metrics, MetricsSink


class TensorBoardSink(MetricsSink):
    """Write each metric as a scalar summary."""

    def open(self, run: Path, last_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        folder = run / EVENTS
        again = any(folder.glob("events.out.*"))
        self._writer = EventFileWriter(str(folder))
        if again:
            # A session's start makes TensorBoard discard the steps from here on of earlier files.
            begin = SessionLog(status=SessionLog.START)
            self._writer.add_event(
                Event(wall_time=time.time(), step=last_step + 1, session_log=begin)
            )

    def add(self, metrics: Metrics) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
            if name != "step"
        ]
        summary, step = self._summary(value=values), int(metrics["step"])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()
