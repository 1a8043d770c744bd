"""Weights & Biases: a run of the same name in the folder `wandb`, offline unless WANDB_MODE says
otherwise, for compute nodes have no network. `wandb sync RUN/wandb/offline-run-*` sends it.
"""

import secrets
from pathlib import Path

from mpillm.runs.folder import WANDB
from mpillm.runs.metrics import Metrics, MetricsSink
from mpillm.runs.sinks.run_settings import run_settings
from mpillm.system.atomic import write_text
from mpillm.system.environment import set_default

IDENTITY = "mpillm-run-id"


class WandbSink(MetricsSink):
    """Log each object over its step; a resumed run continues the run of the same identity."""

    def open(self, run: Path, last_step: int) -> None:
        set_default("WANDB_MODE", "offline")
        import wandb

        folder = run / WANDB
        folder.mkdir(exist_ok=True)
        identity = folder / IDENTITY
        if not identity.exists():
            write_text(identity, secrets.token_hex(8))
        self._run = wandb.init(
            id=identity.read_text().strip(),
            name=run.resolve().name,
            dir=str(run),
            config=run_settings(run),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        # Its own count of steps never goes back, as a resumed run does, so ours is the axis.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add(self, metrics: Metrics) -> None:
        self._run.log(dict(metrics))

    def close(self) -> None:
        self._run.finish()

    def abandon(self) -> None:
        self._run.finish(exit_code=1)
