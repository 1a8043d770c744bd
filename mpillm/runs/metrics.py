"""What a run leaves behind for people and programs: metrics.jsonl, TensorBoard events, loss.png."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mpillm.system.atomic import replacing, write_text

METRICS, PICTURE, EVENTS, RECIPE = "metrics.jsonl", "loss.png", "tensorboard", "recipe.toml"
CLUSTER, TRACE = "cluster.json", "trace.json"
Metrics = dict[str, float]


def read_metrics(path: Path) -> Iterator[Metrics]:
    """The objects of a metrics file; a line that was cut short by a crash is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            yield json.loads(line)


class MetricsWriter:
    """The files of one run, written by rank 0: elsewhere (`writes` false) it does nothing."""

    def __init__(self, run: Path, last_step: int, writes: bool) -> None:
        """Begin at the step after `last_step`: what an earlier try recorded beyond it is taken out."""
        self._run, self._writes = run, writes
        if not writes:
            return
        kept = [metrics for metrics in read_metrics(run / METRICS) if metrics["step"] <= last_step]
        write_text(run / METRICS, "".join(_line(metrics) for metrics in kept))
        self._file = (run / METRICS).open("a", encoding="utf-8")
        self._events = _Events(run / EVENTS, last_step)

    def add(self, metrics: Metrics) -> None:
        """One object: a step, or an evaluation (`step`, `validation_loss`)."""
        if not self._writes:
            return
        self._file.write(_line(metrics))
        self._file.flush()
        self._events.add(metrics)

    def draw(self) -> None:
        """(Re)draw loss.png from the metrics so far."""
        if self._writes:
            with suppress(
                OSError
            ):  # a full disk has a worse thing to tell than that its picture is missing
                draw_loss(list(read_metrics(self._run / METRICS)), self._run / PICTURE)

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._events.close()


def _line(metrics: Metrics) -> str:
    return json.dumps(metrics) + "\n"


class _Events:
    """TensorBoard's event file, by TensorBoard's own writer: torch's, around it, takes a second to load."""

    def __init__(self, folder: Path, last_step: int) -> None:
        """What an earlier try told beyond `last_step` no longer holds."""
        # Imported here: only rank 0 needs it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        again = any(folder.glob("events.out.*"))
        self._writer = EventFileWriter(str(folder))
        if again:
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
        self._writer.add_event(
            self._event(
                wall_time=time.time(),
                step=int(metrics["step"]),
                summary=self._summary(value=values),
            )
        )

    def close(self) -> None:
        self._writer.close()


def draw_loss(metrics: list[Metrics], path: Path) -> None:
    """A picture of the training and the validation loss over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    validation = [(m["step"], m["validation_loss"]) for m in metrics if "validation_loss" in m]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", linewidth=0.6, alpha=0.4)
        axes.plot(*zip(*_smooth(training), strict=True), color="tab:blue", label="training")
    if validation:
        axes.plot(
            *zip(*validation, strict=True),
            color="tab:orange",
            marker="o",
            markersize=4,
            label="validation",
        )
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=path.parent.name)
    axes.grid(alpha=0.3)
    if training or validation:
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """An exponential average over some fiftieth of the run, and over less at its steep beginning."""
    window = max(1.0, len(points) / 50)
    smooth, level = [], points[0][1]
    for index, (step, value) in enumerate(points):
        level += (value - level) / min(1 + index / 4, window)
        smooth.append((step, level))
    return smooth
