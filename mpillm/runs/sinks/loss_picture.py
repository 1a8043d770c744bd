"""loss.png: the training and the validation loss over the steps, drawn when the run ends."""

import importlib.util
import math
from pathlib import Path

from mpillm.runs.folder import METRICS, PICTURE
from mpillm.runs.metrics import Metrics, MetricsSink, read_metrics
from mpillm.system.atomic import replacing

# matplotlib's margins overflow beyond this.
LARGEST = 1e300


class LossPictureSink(MetricsSink):
    """Draw all steps of metrics.jsonl at the end, those of earlier attempts included."""

    def open(self, run: Path, last_step: int) -> None:
        self._run = run
        # matplotlib takes most of a second to import, so it is imported at the end alone.
        if importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    def add(self, metrics: Metrics) -> None:
        """Do nothing: metrics.jsonl holds the step."""

    def close(self) -> None:
        draw_loss(list(read_metrics(self._run / METRICS)), self._run / PICTURE)

    def abandon(self) -> None:
        """Do nothing: drawing takes seconds, in which other ranks would end the job."""


def draw_loss(metrics: list[Metrics], path: Path) -> None:
    """Draw the training and the validation loss over the steps as a PNG file at `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training, validation = _points(metrics, "loss"), _points(metrics, "validation_loss")
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
    with replacing(path, plain=True) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _points(metrics: list[Metrics], key: str) -> list[tuple[float, float]]:
    """Collect (step, value): a loss that is not finite, or too large to draw, is left out."""
    found = ((line["step"], line.get(key, math.nan)) for line in metrics)
    return [(step, float(value)) for step, value in found if abs(value) < LARGEST]


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average exponentially over a fiftieth of the run, and over less at its steep beginning."""
    window = max(1.0, len(points) / 50)
    smooth, level = [], points[0][1]
    for index, (step, value) in enumerate(points):
        level += (value - level) / min(1 + index / 4, window)
        smooth.append((step, level))
    return smooth
