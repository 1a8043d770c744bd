"""MLflow: a run at MLFLOW_TRACKING_URI, or else in files in the folder `mlflow` of the run, for
databases lock badly on parallel file systems. docs/train.md says how to show them.
"""

import time
from pathlib import Path

from mpillm.runs.folder import MLFLOW
from mpillm.runs.metrics import Metrics, MetricsSink
from mpillm.runs.sinks.run_settings import run_settings
from mpillm.system.atomic import write_text
from mpillm.system.environment import set_default

IDENTITY = "mpillm-run-id"
EXPERIMENT = "mpillm"


class MlflowSink(MetricsSink):
    """Log each object at its step; a resumed run continues its own run."""

    def open(self, run: Path, last_step: int) -> None:
        # MLflow 3 asks for this word before it writes files.
        set_default("MLFLOW_ALLOW_FILE_STORE", "true")
        import mlflow
        from mlflow.entities import Metric

        self._metric = Metric
        folder = run / MLFLOW
        folder.mkdir(exist_ok=True)
        place = None if mlflow.is_tracking_uri_set() else folder.resolve().as_uri()
        self._client = mlflow.MlflowClient(place)
        identity = folder / IDENTITY
        if identity.exists():
            self._id = identity.read_text().strip()
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        number = (
            experiment.experiment_id if experiment else self._client.create_experiment(EXPERIMENT)
        )
        made = self._client.create_run(number, run_name=run.resolve().name)
        self._id = made.info.run_id
        write_text(identity, self._id)
        for name, value in run_settings(run).items():
            self._client.log_param(self._id, name, value)

    def add(self, metrics: Metrics) -> None:
        now, step = int(time.time() * 1000), int(metrics["step"])
        values = [
            self._metric(name, value, now, step)
            for name, value in metrics.items()
            if name != "step"
        ]
        self._client.log_batch(self._id, metrics=values)

    def close(self) -> None:
        self._client.set_terminated(self._id, "FINISHED")

    def abandon(self) -> None:
        self._client.set_terminated(self._id, "FAILED")
