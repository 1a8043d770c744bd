"""TensorBoard's event files, by its own records: torch's wrapper takes a second to load, and its
writer's thread prints a traceback where a disk is full.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any

from mpillm.runs.folder import EVENTS
from mpillm.runs.metrics import Metrics, MetricsSink

# A run that is watched shows its steps this soon; each flush is a write to a parallel file system.
FLUSH_SECONDS = 10.0


class TensorBoardSink(MetricsSink):
    """Write each metric as a scalar summary."""

    def open(self, run: Path, last_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder = run / EVENTS
        folder.mkdir(exist_ok=True)
        again = any(folder.glob("events.out.*"))
        # TensorBoard reads the files of a folder in the order of the times in their names.
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._writer, self._flushed = RecordWriter((folder / name).open("ab")), time.monotonic()
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if again:
            # A session's start makes TensorBoard discard the steps from here on of earlier files.
            begin = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=last_step + 1, session_log=begin))
        self._writer.flush()

    def add(self, metrics: Metrics) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
            if name != "step"
        ]
        summary, step = self._summary(value=values), int(metrics["step"])
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())

    def close(self) -> None:
        self._writer.close()
