"""A recipe can be read and a plan made where neither torch nor MPI is installed: a login node."""

import json
from pathlib import Path

import pytest

SCRIPT = """
import sys
# None makes `import torch` raise ImportError, as if it were not installed.
sys.modules["torch"] = sys.modules["mpi4py"] = None
from mpillm.models import model_catalog, spec
from mpillm.parallel import axis_sizes, step_plan
from mpillm.train import recipe
found = recipe.parse_recipe({{"data": {{"path": "x"}}, {sections}}}, "x")
model = found.model.replace(vocab_size=1000)
sizes = axis_sizes.mesh_sizes(found.parallel, 4, model, found.train.batch)
plan = step_plan.plan_step(model, found.parallel, sizes["data"], found.train.batch)
traffic = step_plan.traffic_bytes(sizes, model, found.train.batch, plan.schedule.chunks)
assert model.parameters and model.flops_per_token and traffic["data"] > 0
assert len(plan.parts) == sizes["pipeline"] and model.activation_bytes(plan.parts[0], 1)
print(sizes, recipe.load_recipe.__name__, model_catalog.DEFAULT, spec.Part(0, 1).count)
"""


@pytest.mark.parametrize("sections", ["", '"parallel": {"pipeline": 2}'])
def test_a_recipe_is_planned_without_torch_and_mpi(python, sections: str) -> None:  # type: ignore[no-untyped-def]
    done = python("-c", SCRIPT.format(sections=sections))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'data': ")


DRY_RUN = """
import sys
sys.modules["torch"] = sys.modules["mpi4py"] = None
sys.argv = ["mpillm", "train", "{recipe}", "--dry-run", *"{options}".split()]
from mpillm.cli import main
main()
"""


def test_a_dry_run_needs_neither(python, data: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "recipe.toml"
    path.write_text(f'[data]\npath = "{data}"\n[parallel]\ndata = 2\npipeline = 2\n')
    done = python("-c", DRY_RUN.format(recipe=path, options="--json"))
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["ranks"]) == 4
    refused = python("-c", DRY_RUN.format(recipe=path, options="--nodes 3 --ranks-per-node 1"))
    assert refused.returncode == 2
    assert "parallel.data = 2 × parallel.pipeline = 2 needs 4 ranks" in refused.stderr
    assert "Traceback" not in refused.stderr
