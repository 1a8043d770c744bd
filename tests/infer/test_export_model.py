"""`mpillm export`: what was imported comes back bit for bit; transformers reads the same model."""

import json
import stat
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import RecipeError, UsageError
from mpillm.infer import export_model as module
from mpillm.infer.export_model import export_model
from mpillm.infer.import_model import import_model
from mpillm.infer.loading import load_trained
from mpillm.models.block_settings import BlockSettings
from mpillm.models.encoder import EncoderConfig
from mpillm.models.encoder_decoder import SHAPES
from mpillm.models.model_catalog import named_shapes
from mpillm.system.console import Console
from tests.pretrained import peer
from tests.published import GPT2, SPEC, publish, weights_of

safetensors_torch = pytest.importorskip("safetensors.torch")
QUIET = Console(speaks=False)
T5, MARIAN = (
    SHAPES[name].replace(
        layers=2, width=32, heads=4, hidden=48, context=16, source_context=32, vocab_size=300
    )
    for name in ("t5-tiny", "marian-base")
)


BERT = EncoderConfig(
    layers=2,
    width=32,
    heads=4,
    context=32,
    vocab_size=300,
    token_types=2,
    head="sequence",
    head_layer="tanh",
    classes=3,
)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors_torch.load_file(file)
    return found


@pytest.mark.parametrize("shard_bytes", [4 << 30, 5_000])
@pytest.mark.parametrize(
    "spec", [SPEC, GPT2, BERT, T5, MARIAN], ids=["llama", "gpt2", "bert", "t5", "marian"]
)
def test_a_folder_comes_back_bit_for_bit(
    folder: Path,
    comm: MPI.Intracomm,
    monkeypatch: pytest.MonkeyPatch,
    spec: BlockSettings,
    shard_bytes: int,
) -> None:
    """In one file, and in several with an index, which ranks write in turn."""
    monkeypatch.setattr(module, "SHARD_BYTES", shard_bytes)
    if comm.rank == 0:
        publish(folder / "hub", spec)
    comm.Barrier()
    import_model(folder / "hub", folder / "imported", comm, QUIET)
    made = export_model(folder / "imported", folder / "out", "hf", "auto", comm, QUIET)
    comm.Barrier()
    expected, found = tensors_of(folder / "hub"), tensors_of(folder / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert made.nbytes == sum(2 * tensor.numel() for tensor in expected.values())
    assert (made.files > 1) == (shard_bytes < 4 << 30)
    texts = [(folder / place / "tokenizer.json").read_text() for place in ("hub", "out")]
    assert texts[0] == texts[1]
    assert (folder / "out/config.json").is_file()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (folder / "out").iterdir()}
    assert len(modes) == 1
    # What was written can be imported again.
    import_model(folder / "out", folder / "again", comm, QUIET)
    one, other = (load_trained(folder / name, comm, QUIET).model for name in ("imported", "again"))
    for weight, same in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same)
    comm.Barrier()
    if comm.rank == 0:
        hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert hidden == []


def test_plain_tensors_have_our_names(folder: Path, comm: MPI.Intracomm) -> None:
    if comm.rank == 0:
        publish(folder / "hub")
    comm.Barrier()
    import_model(folder / "hub", folder / "imported", comm, QUIET)
    export_model(folder / "imported", folder / "out", "safetensors", "float32", comm, QUIET)
    comm.Barrier()
    found, expected = tensors_of(folder / "out"), weights_of(SPEC)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].bfloat16().float()) for name in expected)
    recipe = json.loads((folder / "out/recipe.json").read_text())
    assert recipe["model"]["layers"] == SPEC.layers
    with pytest.raises(UsageError, match="is there already"):
        export_model(folder / "imported", folder / "out", "hf", "auto", comm, QUIET)


def test_a_model_of_no_family_is_refused(folder: Path, comm: MPI.Intracomm) -> None:
    """Learned positions with RMSNorm: no published model is so."""
    if comm.rank == 0:
        publish(folder / "hub")
    comm.Barrier()
    import_model(folder / "hub", folder / "imported", comm, QUIET)
    odd = SPEC.replace(positions="learned")
    with pytest.raises(RecipeError, match="no family of Hugging Face is this model"):
        module._family(odd, "llama")
    # One clear reason, and not those of each family of another architecture.
    with pytest.raises(RecipeError, match="model: there is none of the architecture lstm; export"):
        module._family(named_shapes()["lstm"], "")


@pytest.mark.parametrize("spec", [SPEC, GPT2, T5, MARIAN], ids=["llama", "gpt2", "t5", "marian"])
def test_transformers_reads_the_same_model(tmp_path: Path, spec: BlockSettings) -> None:
    """On one rank: the library takes long to import."""
    transformers = peer("transformers")
    publish(tmp_path / "hub", spec)
    import_model(tmp_path / "hub", tmp_path / "imported", MPI.COMM_SELF, QUIET)
    made = export_model(
        tmp_path / "imported", tmp_path / "out", "hf", "float32", MPI.COMM_SELF, QUIET
    )
    theirs = getattr(transformers, made.reader).from_pretrained(tmp_path / "out").eval()
    ours = load_trained(tmp_path / "imported", MPI.COMM_SELF, QUIET).model
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        if spec.source_field:
            found = theirs(input_ids=ids, decoder_input_ids=ids.flip(1)).logits
            wanted = ours({"source": ids, "ids": ids.flip(1)})
        else:
            found, wanted = theirs(ids).logits, ours(ids)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
