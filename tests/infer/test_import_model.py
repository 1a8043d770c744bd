"""`mpillm import`: a Hugging Face folder becomes a checkpoint, at any number of ranks."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from mpi4py import MPI

from mpillm.bench.tensor_peak import peak_tensor_bytes
from mpillm.errors import CheckpointError, DataError, MismatchError, UsageError
from mpillm.infer.export_model import export_model
from mpillm.infer.generate import generate
from mpillm.infer.import_model import import_model, print_import
from mpillm.infer.loading import load_data, load_trained
from mpillm.infer.sampling import Sampling
from mpillm.models.decoder import DecoderConfig
from mpillm.models.encoder import EncoderConfig
from mpillm.system.console import Console
from mpillm.tokens.tokenizer import train_bpe
from mpillm.weights import file_boxes
from mpillm.weights.gguf_source import GgufSource
from mpillm.weights.open_source import open_source
from mpillm.weights.published_model import PublishedModel
from mpillm.weights.saving import assign_writers
from tests.published import GPT2, SPEC, publish, weights_of

safetensors_torch = pytest.importorskip("safetensors.torch")
QUIET = Console(speaks=False)


def test_each_weight_is_that_of_the_folder(published: Path, comm: MPI.Intracomm) -> None:
    out = published.parent / "imported"
    found = import_model(published, out, comm, QUIET)
    assert found.model.resolved() == SPEC.resolved()
    loaded = load_trained(out, comm, QUIET)
    expected = weights_of(SPEC)
    weights = dict(loaded.model.named_weights())
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight.detach(), expected[name].bfloat16().float()), name
    facts = loaded.checkpoint.facts
    assert facts["imported"] == {
        "from": str(published),
        "model_type": "llama",
        "dtype": "bfloat16",
    }
    assert json.loads(loaded.checkpoint.text("config.json"))["model_type"] == "llama"
    sampling = Sampling(max_tokens=5, temperature=0)
    text = "".join(generate(loaded.model, loaded.tokenizer, "word", sampling))
    assert isinstance(text, str)
    with pytest.raises(DataError, match="was imported and was trained on no dataset of ours"):
        load_data(loaded.checkpoint, None)


def test_a_folder_that_is_not_empty_is_left_alone(published: Path, comm: MPI.Intracomm) -> None:
    with pytest.raises(UsageError, match="is there already and not empty"):
        import_model(published, published, comm, QUIET)


def rewrite(folder: Path, comm: MPI.Intracomm, change: Any) -> None:
    """Change the tensors of a folder, on rank 0."""
    if comm.rank == 0:
        path = folder / "model.safetensors"
        tensors = safetensors_torch.load_file(path)
        change(tensors)
        safetensors_torch.save_file(tensors, path)
    comm.Barrier()


FINAL = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(FINAL), f"lacks 1 tensors of a llama model: {FINAL}"),
        (lambda t: t.update(strange=torch.ones(1)), "has, unknown to its family, 1 .*: strange"),
        (
            lambda t: [t.pop(name) for name in sorted(t)[1:8]],
            r"lacks 7 tensors of a llama model: (model\.[\w.]+, ){5}…; download it again",
        ),
        (
            lambda t: t.update({f"strange.{n}": torch.ones(1) for n in range(6)}),
            r"has, unknown to its family, 6 .*: strange\.0, .*strange\.4, …; download",
        ),
        (lambda t: t.update({FINAL: torch.ones(3)}), r"model\.norm\.weight of shape \[3\]"),
        (lambda t: t.update({"a.rotary_emb.inv_freq": torch.ones(1)}), ""),
    ],
)
def test_names_and_shapes_are_compared(
    published: Path, comm: MPI.Intracomm, change: Any, words: str
) -> None:
    rewrite(published, comm, change)
    out = published.parent / "imported"
    if not words:
        assert import_model(published, out, comm, QUIET).checkpoint.is_dir()
        return
    with pytest.raises(CheckpointError, match=words):
        import_model(published, out, comm, QUIET)
    assert not out.exists()


def test_a_tied_head_that_differs_is_refused(folder: Path, comm: MPI.Intracomm) -> None:
    """Both names may be in a file, of one value."""
    tied = SPEC.replace(tied=True)
    head = weights_of(tied)["embedding.weight"].bfloat16()
    if comm.rank == 0:
        publish(folder / "same", tied, **{"lm_head.weight": head})
        publish(folder / "other", tied, **{"lm_head.weight": head + 1})
    comm.Barrier()
    import_model(folder / "same", folder / "imported", comm, QUIET)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight"):
        import_model(folder / "other", folder / "another", comm, QUIET)


def test_what_does_not_belong_is_refused(published: Path, comm: MPI.Intracomm) -> None:
    out, config = published.parent / "imported", published / "config.json"
    whole = json.loads(config.read_text())
    for changed, error, words in (
        ({**whole, "model_type": "lama"}, CheckpointError, "the nearest is llama"),
        ({"hidden_size": 3}, CheckpointError, "config.json has no model_type"),
    ):
        comm.Barrier()
        if comm.rank == 0:
            config.write_text(json.dumps(changed))
        comm.Barrier()
        with pytest.raises(error, match=words):
            import_model(published, out, comm, QUIET)
    comm.Barrier()
    if comm.rank == 0:
        config.write_text(json.dumps({**whole, "vocab_size": 200}))
        rewritten = safetensors_torch.load_file(published / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            rewritten[name] = rewritten[name][:200].clone()
        safetensors_torch.save_file(rewritten, published / "model.safetensors")
    comm.Barrier()
    with pytest.raises(MismatchError, match="a tokenizer of 257 tokens and an embedding of 200"):
        import_model(published, out, comm, QUIET)
    comm.Barrier()
    if comm.rank == 0:
        (published / "tokenizer.json").unlink()
    comm.Barrier()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; make it"):
        import_model(published, out, comm, QUIET)


def test_a_half_copied_file_is_refused(published: Path, comm: MPI.Intracomm) -> None:
    path = published / "model.safetensors"
    if comm.rank == 0:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    comm.Barrier()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no safetensors file, or is"):
        import_model(published, published.parent / "imported", comm, QUIET)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_setting_of_2_63_is_refused(published: Path, comm: MPI.Intracomm, name: str) -> None:
    config = published / "config.json"
    if comm.rank == 0:
        whole = json.loads(config.read_text())
        config.write_text(json.dumps({**whole, name: 1 << 63}))
    comm.Barrier()
    with pytest.raises(CheckpointError, match=rf"{name} = 9223372036854775808 is not supported"):
        import_model(published, published.parent / "imported", comm, QUIET)


def test_a_chat_template_is_never_run(published: Path, comm: MPI.Intracomm) -> None:
    """One that reaches for the system comes along as the text that it is."""
    gone = published.parent / f"run-by-{comm.rank}"
    template = "{{ cycler.__init__.__globals__.os.mkdir('%s') }}"
    # It does what it says where it is rendered as any other template.
    jinja2.Environment().from_string(template % gone).render()
    gone.rmdir()
    hostile = template % (published.parent / "run-by-0")
    if comm.rank == 0:
        (published / "chat_template.jinja").write_text(hostile)
        named = {"chat_template": hostile}
        (published / "tokenizer_config.json").write_text(json.dumps(named))
        (published / "tokenizer.json").write_text(train_bpe(["the cat "], 280).to_json())
        config = json.loads((published / "config.json").read_text())
        (published / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    comm.Barrier()
    run = published.parent / "imported"
    import_model(published, run, comm, QUIET)
    loaded = load_trained(run, comm, QUIET)
    "".join(generate(loaded.model, loaded.tokenizer, "the", Sampling(max_tokens=3)))
    export_model(run, published.parent / "hf", "hf", "auto", comm, QUIET)
    export_model(run, published.parent / "m.gguf", "gguf", "auto", comm, QUIET)
    comm.Barrier()
    assert (published.parent / "hf/chat_template.jinja").read_text() == hostile
    stored = GgufSource(published.parent / "m.gguf").facts["tokenizer.chat_template"]
    assert stored == hostile
    assert list(published.parent.glob("run-by-*")) == []


def test_a_bare_model_lacks_the_prefix(published: Path, comm: MPI.Intracomm) -> None:
    def bare(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(published, comm, bare)
    model = PublishedModel.open(open_source(published, comm, QUIET))
    assert model.read("norm.weight").shape == (32,)


# One tensor of theirs holds three of ours, each a box of its columns.
FUSED = GPT2.replace(width=64)


@pytest.mark.parametrize("spec", [SPEC, FUSED], ids=["llama", "gpt2"])
def test_ranks_read_each_byte_once(
    folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, spec: DecoderConfig
) -> None:
    if comm.rank == 0:
        publish(folder / "hub", spec)
    comm.Barrier()
    read: list[tuple[int, int]] = []
    real = file_boxes.read_at

    def counted(file: int, values: Any, offset: int) -> None:
        read.append((offset, offset + values.nbytes))
        real(file, values, offset)

    monkeypatch.setattr(file_boxes, "read_at", counted)
    import_model(folder / "hub", folder / "imported", comm, QUIET)
    everything = sorted(span for own in comm.allgather(read) for span in own)
    size = (folder / "hub/model.safetensors").stat().st_size
    nbytes = 2 * sum(tensor.numel() for tensor in weights_of(spec).values())
    assert everything[0][0] == size - nbytes
    assert all(end == first for (_, end), (first, _) in itertools.pairwise(everything))
    assert everything[-1][1] == size
    shares = comm.allgather(sum(last - first for first, last in read))
    assert max(shares) < 2 * nbytes / comm.size


def test_a_rank_holds_its_share_and_one_tensor(published: Path, comm: MPI.Intracomm) -> None:
    """The share in float32 is what the file of the rank is written from."""
    out = published.parent / "imported"
    sizes = {name: 4 * tensor.numel() for name, tensor in weights_of(SPEC).items()}
    share = sum(sizes[name] for name in assign_writers([sizes] * comm.size)[comm.rank])
    peak = peak_tensor_bytes(lambda: import_model(published, out, comm, QUIET), "cpu")
    assert 0.9 * share < peak < share + 1.15 * max(sizes.values())


def test_a_bert_s_old_names_and_its_other_head_are_read(folder: Path, comm: MPI.Intracomm) -> None:
    """As the first files have them: a pooler and next sentences, and norms of other names."""
    spec = EncoderConfig(layers=2, width=32, heads=4, context=16, vocab_size=300, token_types=2)
    if comm.rank == 0:
        other = {
            "bert.pooler.dense.weight": torch.ones(32, 32),
            "cls.seq_relationship.bias": torch.ones(2),
            "bert.embeddings.position_ids": torch.arange(16)[None],
            "cls.predictions.decoder.bias": weights_of(spec)["head.bias"].bfloat16(),
        }
        published = publish(folder / "published", spec, **other)
        tensors = safetensors_torch.load_file(published / "model.safetensors")
        for old, new in (("gamma", "LayerNorm.weight"), ("beta", "LayerNorm.bias")):
            for name in [name for name in tensors if name.endswith(new)]:
                tensors[f"{name.rpartition('.')[0]}.{old}"] = tensors.pop(name)
        safetensors_torch.save_file(tensors, published / "model.safetensors")
        config = json.loads((published / "config.json").read_text())
        config["architectures"] = ["BertForPreTraining"]
        (published / "config.json").write_text(json.dumps(config))
    comm.Barrier()
    made = import_model(folder / "published", folder / "imported", comm, QUIET)
    assert made.model.resolved() == spec.resolved()
    weights = dict(load_trained(folder / "imported", comm, QUIET).model.named_weights())
    for name, expected in weights_of(spec).items():
        assert torch.equal(weights[name].detach(), expected.bfloat16().float()), name
    said = io.StringIO()
    print_import(made, folder / "imported", Console(stream=said))
    assert f'next: train.start_from = "{folder / "imported"}"' in said.getvalue()
