"""The sinks of a run's metrics by name; a plug-in is named as `package.module:Name`."""

from collections.abc import Mapping
from types import MappingProxyType

SINKS: Mapping[str, str] = MappingProxyType(
    {
        "metrics.jsonl": "mpillm.runs.sinks.jsonl:JsonlSink",
        "TensorBoard": "mpillm.runs.sinks.tensorboard_events:TensorBoardSink",
        "loss.png": "mpillm.runs.sinks.loss_picture:LossPictureSink",
        "wandb": "mpillm.runs.sinks.wandb_run:WandbSink",
        "mlflow": "mpillm.runs.sinks.mlflow_run:MlflowSink",
    }
)
LINES = "metrics.jsonl"
"""Every run writes it, ahead of all others: `status`, `report` and `--resume` read it."""
DEFAULT = ("TensorBoard", "loss.png")
"""The sinks of a run that names none, next to metrics.jsonl."""
