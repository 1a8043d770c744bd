"""A small decoder whose weights are the same on every machine, and the recorded figures of lm-eval.

`PYTHONPATH=FOLDER_OF_LM_EVAL python -m tests.infer.harness.random_model` records them again.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from mpillm.infer.export_model import export_model
from mpillm.infer.import_model import import_model
from mpillm.models.decoder import DecoderConfig
from mpillm.models.families.family_catalog import family_of
from mpillm.system.console import Console
from tests.published import publish

HERE = Path(__file__).parent
TASKS = HERE / "tasks"
RECORDED = HERE / "recorded.json"
NAMES = sorted(path.stem for path in TASKS.glob("*.yaml"))
SPEC = DecoderConfig(
    layers=2, width=32, heads=4, kv_heads=2, hidden=64, context=128, vocab_size=300, tied=False
)
QUIET = Console(speaks=False)


def make_model(folder: Path) -> Path:
    """Write a model, and import it. Its weights are whole numbers by a power of two, exact in
    bfloat16: initial values from a normal distribution depend on the processor.
    """
    chance = np.random.default_rng(5)
    tensors = {}
    for name, shape in family_of(SPEC).tensors(SPEC).items():
        drawn = torch.from_numpy(chance.integers(-100, 101, shape)).float()
        tensors[name] = (drawn / 256 if len(shape) > 1 else 1 + drawn / 512).bfloat16()
    publish(folder / "hub", SPEC, **tensors)
    import_model(folder / "hub", folder / "model", MPI.COMM_SELF, QUIET)
    return folder / "model"


def figures_of_lm_eval(
    folder: Path, names: Sequence[str], batch: int = 4, tasks: Path = TASKS
) -> dict[str, Any]:
    """Score a Hugging Face folder by lm-eval's own `hf` back end: figures, requests, responses."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=batch)
    known = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(names), task_manager=known, bootstrap_iters=0, log_samples=True
    )
    assert found is not None
    return {name: plain(found["results"][name], found["samples"][name]) for name in names}


def plain(results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Take out of lm-eval's results what is compared."""
    figures = {
        key: float(value)
        for key, value in results.items()
        if "," in key and "_stderr" not in key and not key.startswith("alias")
    }
    first = samples[0]["filter"]
    return {
        "figures": figures,
        "samples": [
            {
                "requests": [
                    [each for each in one if isinstance(each, str)] for one in s["arguments"]
                ],
                "responses": [one[0] for one in s["resps"]],
            }
            for s in samples
            if s["filter"] == first
        ],
    }


def main() -> None:
    import os

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_model(make_model(folder), folder / "hf", "hf", "float32", MPI.COMM_SELF, QUIET)
        os.chdir(TASKS)  # where the paths of the data files begin
        found = figures_of_lm_eval(folder / "hf", NAMES)
    RECORDED.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
