"""Adapters in PEFT's folder: names, settings, and PEFT's own logits where it is installed."""

import json
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import CheckpointError, MismatchError, RecipeError, UsageError
from mpillm.infer.export_model import export_model
from mpillm.infer.import_model import import_model
from mpillm.infer.loading import load_trained
from mpillm.models.families.family_catalog import family_of
from mpillm.models.tuning import INFIX
from mpillm.system.console import Console
from mpillm.weights.peft_format import CONFIG, TENSORS, their_names
from tests.published import GPT2, SPEC, publish

save_file = pytest.importorskip("safetensors.torch").save_file
load_file = pytest.importorskip("safetensors.torch").load_file
QUIET = Console(speaks=False)


@pytest.fixture(scope="session")
def hub(shared_folder: Path, comm: MPI.Intracomm) -> Path:
    """A published model; its import is next to it, `peft-base`."""
    path = shared_folder / "peft-hub"
    if comm.rank == 0:
        publish(path)
    comm.Barrier()
    import_model(path, shared_folder / "peft-base", comm, QUIET)
    return path


@pytest.fixture(scope="session", params=["lora", "dora"])
def theirs(
    request: pytest.FixtureRequest, shared_folder: Path, hub: Path, comm: MPI.Intracomm
) -> Path:
    """A folder as PEFT writes it, of queries and of the last layer's down."""
    path = shared_folder / f"peft-{request.param}"
    if comm.rank:
        comm.Barrier()
        return path
    path.mkdir()
    chance, tensors = torch.Generator().manual_seed(5), {}
    for module, outputs, inputs in (
        ("model.layers.0.self_attn.q_proj", 32, 32),
        ("model.layers.1.self_attn.q_proj", 32, 32),
        ("model.layers.1.mlp.down_proj", 32, 64),
    ):
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(3, inputs, generator=chance)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, 3, generator=chance) / 10
        if request.param == "dora":
            tensors[f"{prefix}.lora_magnitude_vector"] = torch.rand(outputs, generator=chance) + 0.5
    save_file(tensors, path / TENSORS, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(hub),
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "model.layers.1.mlp.down_proj"],
        "use_dora": request.param == "dora",
        "bias": "none",
    }
    (path / CONFIG).write_text(json.dumps(config))
    comm.Barrier()
    return path


def test_there_and_back(
    theirs: Path, hub: Path, folder: Path, shared_folder: Path, comm: MPI.Intracomm
) -> None:
    base = shared_folder / "peft-base"
    found = import_model(theirs, folder / "run", comm, QUIET, base=base)
    assert found.model == SPEC
    loaded, plain = (load_trained(each, comm, QUIET) for each in (folder / "run", base))
    changed = {
        name
        for (name, ours), (_, before) in zip(
            loaded.model.named_weights(), plain.model.named_weights(), strict=True
        )
        if not torch.equal(ours, before)
    }
    query = "attention.query.weight"
    last = "layers.1.feed_forward.down.weight"
    assert changed == {f"layers.0.{query}", f"layers.1.{query}", last}
    made = export_model(folder / "run", folder / "out", "peft", "auto", comm, QUIET)
    comm.Barrier()
    assert (made.files, made.reader) == (1, "")
    before, after = load_file(theirs / TENSORS), load_file(folder / "out" / TENSORS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((folder / "out" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6.0)
    assert len(config["target_modules"]) == 3
    with pytest.raises(UsageError, match="holds a whole model and no adapters"):
        export_model(base, folder / "none", "peft", "auto", comm, QUIET)


def test_another_base_is_refused(
    theirs: Path, folder: Path, shared_folder: Path, comm: MPI.Intracomm
) -> None:
    if comm.rank == 0:
        publish(folder / "wide", SPEC.replace(width=64, hidden=128))
        publish(folder / "short", SPEC.replace(layers=1))
    comm.Barrier()
    for name, message in (
        ("wide", r"q_proj.lora_A.weight has the shape \[3, 32\], and the base's .* \[64, 64\]"),
        ("short", r"another base, which has the layers of .*model\.layers\.1"),
    ):
        import_model(folder / name, folder / f"{name}-base", comm, QUIET)
        with pytest.raises(MismatchError, match=message):
            import_model(theirs, folder / "run", comm, QUIET, base=folder / f"{name}-base")
    with pytest.raises(UsageError, match="is not imported yet; make a checkpoint"):
        import_model(theirs, folder / "run", comm, QUIET)
    with pytest.raises(UsageError, match="--base is of adapters"):
        import_model(folder / "wide", folder / "run", comm, QUIET, base=folder / "wide")


def test_other_kinds_are_refused(
    theirs: Path, folder: Path, shared_folder: Path, comm: MPI.Intracomm
) -> None:
    config, base = json.loads((theirs / CONFIG).read_text()), shared_folder / "peft-base"
    for changes, message in (
        ({"peft_type": "IA3"}, "is of the kind 'IA3'"),
        ({"rank_pattern": {"q_proj": 8}}, "has rank_pattern ="),
        ({"r": 0}, "r = 0 and lora_alpha = 6"),
        ({"init_lora_weights": "pissa_niter_4"}, "which changed the weights of the base"),
        ({"alora_invocation_tokens": [1, 2]}, "has alora_invocation_tokens ="),
    ):
        if comm.rank == 0:
            (folder / CONFIG).write_text(json.dumps({**config, **changes}))
        comm.Barrier()
        with pytest.raises(CheckpointError, match=message):
            import_model(folder, folder / "run", comm, QUIET, base=base)
        comm.Barrier()


def test_layers_outside_of_the_blocks_and_scalars_are_refused(
    theirs: Path, folder: Path, shared_folder: Path, comm: MPI.Intracomm
) -> None:
    base = shared_folder / "peft-base"
    tensors, prefix = load_file(theirs / TENSORS), "base_model.model"
    head = {
        f"{prefix}.lm_head.lora_A.weight": torch.ones(3, SPEC.width),
        f"{prefix}.lm_head.lora_B.weight": torch.ones(SPEC.vocab_size, 3),
    }
    scalar = {f"{prefix}.model.layers.0.self_attn.v_proj.lora_A.weight": torch.tensor(1.0)}
    if theirs.name.endswith("dora"):
        head[f"{prefix}.lm_head.lora_magnitude_vector"] = torch.ones(SPEC.vocab_size)
    for more, message in (
        (head, "has adapters of head, outside of the blocks"),
        (scalar, r"v_proj.lora_A.weight has the shape \[\]"),
    ):
        if comm.rank == 0:
            (folder / CONFIG).write_text((theirs / CONFIG).read_text())
            save_file({**tensors, **more}, folder / TENSORS)
        comm.Barrier()
        with pytest.raises(MismatchError, match=message):
            import_model(folder, folder / "run", comm, QUIET, base=base)
        comm.Barrier()


def test_an_export_has_one_dtype(folder: Path, shared_folder: Path, comm: MPI.Intracomm) -> None:
    with pytest.raises(UsageError, match="writes adapters in float32; leave --dtype bfloat16 out"):
        export_model(shared_folder / "peft-base", folder / "out", "peft", "bfloat16", comm, QUIET)


def test_a_part_of_a_fused_weight_is_refused() -> None:
    places = family_of(GPT2).places(GPT2)
    name = f"layers.0.attention.query{INFIX}a"
    with pytest.raises(RecipeError, match="has no adapter of a part; export the merged model"):
        their_names([name], places)
    down = f"layers.0.feed_forward.down{INFIX}b"
    theirs = "base_model.model.transformer.h.0.mlp.c_proj.lora_B.weight"
    assert their_names([down], places) == {down: theirs}


def test_peft_computes_the_same(
    theirs: Path, hub: Path, folder: Path, shared_folder: Path, comm: MPI.Intracomm
) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is no extra: pip install peft")
    transformers = pytest.importorskip("transformers")
    base = shared_folder / "peft-base"
    import_model(theirs, folder / "run", comm, QUIET, base=base)
    export_model(folder / "run", folder / "out", "peft", "auto", comm, QUIET)
    comm.Barrier()
    ids_BT = torch.arange(20).view(2, 10)
    with torch.no_grad():
        ours = load_trained(folder / "run", comm, QUIET).model(ids_BT)
    for path in (theirs, folder / "out"):
        model = transformers.AutoModelForCausalLM.from_pretrained(hub, dtype=torch.float32)
        with torch.no_grad():
            adapted = peft.PeftModel.from_pretrained(model, path).eval()
            torch.testing.assert_close(adapted(ids_BT).logits, ours, rtol=1e-4, atol=1e-4)
