"""The sinks of a run's metrics: name → class, in the order in which they are opened and closed."""

from collections.abc import Mapping
from types import MappingProxyType

SINKS: Mapping[str, str] = MappingProxyType(
    {
        # The picture is drawn from the lines of metrics.jsonl, so it comes after them.
        "metrics.jsonl": "mpillm.runs.sinks.jsonl:JsonlSink",
        "TensorBoard": "mpillm.runs.sinks.tensorboard_events:TensorBoardSink",
        "loss.png": "mpillm.runs.sinks.loss_picture:LossPictureSink",
    }
)
