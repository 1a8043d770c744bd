"""`mpillm export --to gguf`: the model comes back, and llama.cpp and transformers read the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import CheckpointError, DataError, RecipeError, UsageError
from mpillm.infer.export_model import export_model
from mpillm.infer.generate import sample_tokens
from mpillm.infer.import_model import import_model
from mpillm.infer.loading import load_trained
from mpillm.infer.sampling import Sampling
from mpillm.models.decoder import DecoderConfig
from mpillm.system.console import Console
from mpillm.tokens.tokenizer import byte_tokenizer, train_bpe
from mpillm.weights.gguf_source import GgufSource
from mpillm.weights.gguf_writing import stored_values
from tests.pretrained import peer
from tests.published import SPEC, publish

gguf = pytest.importorskip("gguf")
QUIET = Console(speaks=False)
TEXT = "The quick brown fox jumps over the lazy dog, again and again. "
VOCABULARY = 300
TOKENIZER = train_bpe([TEXT * 9], VOCABULARY - 5)
# A row that is no multiple of a block is stored in float16: 48 of 32.
MODELS = {
    "llama": SPEC.replace(hidden=48),
    "llama, tied": SPEC.replace(tied=True),
    "mistral": SPEC,
    "qwen2": SPEC.replace(qkv_bias=True),
    "qwen3": SPEC.replace(query_key_norm=True, head_width=16),
    "gpt2": DecoderConfig(
        layers=2,
        width=32,
        heads=4,
        context=32,
        vocab_size=VOCABULARY,
        norm="layernorm",
        positions="learned",
        activation="gelu",
        bias=True,
        tied=True,
    ),
}
GEMMA = SPEC.replace(
    norm="rmsnorm1p", scaled_embedding=True, activation="geglu", tied=True, head_width=16
)
SANDWICH = GEMMA.replace(norm_place="sandwich", window=8)
MODELS |= {
    "gemma": GEMMA,
    "gemma2": SANDWICH.replace(
        layers=3, full_every=2, attention_soft_cap=50.0, logits_soft_cap=30.0
    ),
    "gemma3": SANDWICH.replace(
        layers=7, full_every=6, query_key_norm=True, rope_theta=5e4, window_rope_theta=1e4
    ),
}
# No file of llama.cpp has it.
NO_DROPOUT = dict.fromkeys(("dropout", "attention_dropout", "embedding_dropout"), 0.0)
# The largest error of a value, over the largest of its block.
ERRORS = {"float32": 0, "float16": 1 / 2048, "bfloat16": 1 / 256, "q8_0": 1 / 127, "q4_1": 2 / 15}


def checkpoint_of(
    folder: Path, spec: DecoderConfig, comm: MPI.Intracomm, model_type: str = "", **files: str
) -> Path:
    """Import a model of random weights, written in bfloat16; `files`: more text, by stem."""
    if comm.rank == 0:
        hub = publish(folder / "hub", spec)
        (hub / "tokenizer.json").write_text(TOKENIZER.to_json())
        config = json.loads((hub / "config.json").read_text())
        other = {"model_type": model_type, "sliding_window": None} if model_type else {}
        (hub / "config.json").write_text(json.dumps({**config, "eos_token_id": 0, **other}))
        for stem, text in files.items():
            (hub / f"{stem}.json").write_text(text)
    comm.Barrier()
    import_model(folder / "hub", folder / "imported", comm, QUIET)
    return folder / "imported"


@pytest.mark.parametrize("name", MODELS)
def test_the_model_comes_back_bit_for_bit(folder: Path, comm: MPI.Intracomm, name: str) -> None:
    """In float32: weights, settings, tokenizer and chat template, by way of a GGUF file."""
    spec = MODELS[name]
    named = json.dumps({"chat_template": "{{ messages }}", "pad_token": "x"})
    first = checkpoint_of(
        folder, spec, comm, "mistral" if name == "mistral" else "", tokenizer_config=named
    )
    made = export_model(first, folder / "m.gguf", "gguf", "float32", comm, QUIET)
    comm.Barrier()
    import_model(folder / "m.gguf", folder / "again", comm, QUIET)
    one, other = (load_trained(path, comm, QUIET) for path in (first, folder / "again"))
    settings = (each.model.spec.replace(**NO_DROPOUT).resolved() for each in (one, other))
    assert next(settings) == next(settings)
    weights = dict(one.model.named_weights())
    for weight, same in other.model.named_weights():
        # Gemma's norms are stored as 1 + weight.
        error = 1e-7 if name.startswith("gemma") and "norm" in weight else 0
        torch.testing.assert_close(same, weights[weight], rtol=0, atol=error)
    assert other.tokenizer.encode(TEXT) == one.tokenizer.encode(TEXT)
    assert other.tokenizer.vocab_size == one.tokenizer.vocab_size < VOCABULARY
    assert other.tokenizer.end_of_text == one.tokenizer.end_of_text
    assert other.checkpoint.text("chat_template.jinja") == "{{ messages }}"
    assert made.nbytes <= (folder / "m.gguf").stat().st_size < made.nbytes + 32
    assert [path for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", ERRORS)
def test_each_dtype_keeps_its_precision(folder: Path, comm: MPI.Intracomm, dtype: str) -> None:
    first = checkpoint_of(folder, MODELS["llama"], comm)
    export_model(first, folder / "m.gguf", "gguf", dtype, comm, QUIET)
    comm.Barrier()
    kinds = {name: info.dtype for name, info in GgufSource(folder / "m.gguf").tensors.items()}
    kind = {"float32": "float32", "float16": "float16", "bfloat16": "BF16"}.get(
        dtype, dtype.upper()
    )
    assert kinds["blk.0.attn_q.weight"] == kind
    assert kinds["output_norm.weight"] == "float32"
    # 48 columns are no multiple of a block of 32.
    assert kinds["blk.0.ffn_down.weight"] == (kind if "float" in dtype else "float16")
    import_model(folder / "m.gguf", folder / "again", comm, QUIET)
    one, other = (load_trained(path, comm, QUIET).model for path in (first, folder / "again"))
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    for weight, near in ((w.detach(), n.detach()) for w, n in pairs):
        largest = float(weight.abs().max())
        assert float((weight - near).abs().max()) <= ERRORS[dtype] * largest


def test_what_llama_cpp_lacks_is_refused(folder: Path, comm: MPI.Intracomm) -> None:
    def export(spec: DecoderConfig, number: int) -> None:
        (place := folder / str(number)).mkdir(exist_ok=True)
        first = checkpoint_of(place, spec, comm)
        export_model(first, place / "m.gguf", "gguf", "float32", comm, QUIET)

    two, mixture = MODELS["gemma2"], {"experts": 4, "experts_per_token": 2}
    refused = [
        (SPEC.replace(window=8), "a model with window = 8 is not written .* llama means 0"),
        (SPEC.replace(rope_scaling="linear", rope_factor=2.0), "with rope_scaling = 'linear' is"),
        (MODELS["gpt2"].replace(activation="gelu-exact"), "with activation = 'gelu-exact' is"),
        (two.replace(query_scale_width=24.0), "with query_scale_width = 24.0 is"),
        (two.replace(full_every=3), "with full_every = 3 is"),
        (SPEC.replace(**mixture), "a model of the family mixtral is not written as GGUF; llama,"),
    ]
    for number, (spec, words) in enumerate(refused):
        with pytest.raises(RecipeError, match=words):
            export(spec, number)
        assert not (folder / str(number) / "m.gguf").exists()


def test_names_and_dtypes_are_checked_first(folder: Path, comm: MPI.Intracomm) -> None:
    first = checkpoint_of(folder, SPEC, comm)
    (folder / "taken.gguf").touch()
    comm.Barrier()
    for out, kind, dtype, words in (
        ("taken.gguf", "gguf", "auto", "is there already"),
        ("folder", "gguf", "auto", r"name of a GGUF file ends in \.gguf"),
        ("folder", "hf", "q8_0", "--dtype q8_0 is of GGUF files"),
    ):
        with pytest.raises(UsageError, match=words):
            export_model(first, folder / out, kind, dtype, comm, QUIET)


def test_a_tokenizer_of_bytes_is_refused(folder: Path, comm: MPI.Intracomm) -> None:
    first = checkpoint_of(folder, SPEC, comm, tokenizer=byte_tokenizer().to_json())
    with pytest.raises(DataError, match="has no merges, and llama"):
        export_model(first, folder / "m.gguf", "gguf", "auto", comm, QUIET)


def test_a_value_beyond_float16_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"w has values beyond 65504.* bfloat16"):
        stored_values("w", torch.tensor([1.0, 1e6]), "F16")


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_generates_the_same_tokens(folder: Path, comm: MPI.Intracomm, name: str) -> None:
    peer("xllamacpp")
    from readers.llama_cpp import LlamaCpp

    first = checkpoint_of(folder, MODELS[name], comm)
    export_model(first, folder / "m.gguf", "gguf", "float32", comm, QUIET)
    comm.Barrier()
    loaded = load_trained(first, comm, QUIET)
    prompt = loaded.tokenizer.encode("The quick brown")
    expected = list(sample_tokens(loaded.model, prompt, Sampling(max_tokens=8, temperature=0)))
    if comm.rank == 0:
        with LlamaCpp(folder / "m.gguf", context=32) as server:
            assert server.encode("The quick brown") == prompt
            assert server.greedy(prompt, 8) == expected


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_transformers_reads_the_same_weights(folder: Path, comm: MPI.Intracomm, name: str) -> None:
    transformers = peer("transformers")
    first = checkpoint_of(folder, MODELS[name], comm)
    export_model(first, folder / "m.gguf", "gguf", "float32", comm, QUIET)
    comm.Barrier()
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf")
    loaded = load_trained(first, comm, QUIET)
    ids = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found, expected = theirs.eval()(ids).logits, loaded.model(ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
