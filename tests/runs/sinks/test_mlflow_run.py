"""MLflow, in files: its own client finds what was logged."""

from pathlib import Path

import pytest

from mpillm.runs.folder import MLFLOW, RECIPE
from mpillm.runs.metrics import MetricsWriter

mlflow = pytest.importorskip("mlflow", reason="needs mlflow (pip install 'mpillm[mlflow]')")


def test_a_resumed_run_continues_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / RECIPE).write_text("[train]\nsteps = 2\n")
    for last_step, steps in ((0, (1,)), (1, (2,))):
        writer = MetricsWriter(tmp_path, last_step, True, sinks=("mlflow",))
        for step in steps:
            writer.add({"step": step, "loss": 5.0 - step})
        writer.close()
    client = mlflow.MlflowClient((tmp_path / MLFLOW).as_uri())
    (experiment,) = (e for e in client.search_experiments() if e.name == "mpillm")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.params) == ("FINISHED", {"train.steps": "2"})
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(1, 4.0), (2, 3.0)]
