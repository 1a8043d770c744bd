"""GGUF files of llama.cpp: the model and the tokenizer that they were made of come back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpillm.errors import CheckpointError, MismatchError
from mpillm.infer.import_model import import_model
from mpillm.infer.loading import load_trained
from mpillm.infer.model_source import open_model
from mpillm.models.families.family_catalog import family_of
from mpillm.system.console import Console
from mpillm.tokens.gguf.gguf_tokenizer import CONTROL, RULES, GgufVocabulary, gguf_tokenizer
from mpillm.tokens.tokenizer import Tokenizer, byte_symbols, train_bpe
from mpillm.weights.gguf_architectures import LLAMA_NAMES as NAMES
from mpillm.weights.gguf_source import GgufSource
from mpillm.weights.published_model import their_tensors
from tests.published import SPEC, weights_of

gguf = pytest.importorskip("gguf")
QUIET = Console(speaks=False)
TEXT = "It's 2026: 12 users\n\n  print('é')\tand  more."


def tokenizer_parts() -> tuple[list[str], list[int], list[str]]:
    """Return tokens, types and merges of a small byte-level BPE."""
    tokens = [*sorted(byte_symbols()), "th", "the", "<|im_end|>"]
    return tokens, [1] * 258 + [CONTROL], ["t h", "th e"]


def write(path: Path, turned: bool = True, **facts: Any) -> Path:
    """Write a Llama as llama.cpp's converter does, in float32; with `turned` rotary halves."""
    family = family_of(SPEC)
    make = their_tensors(family, SPEC, weights_of(SPEC).__getitem__)
    writer = gguf.GGUFWriter(path, str(facts.pop("architecture", "llama")))
    writer.add_block_count(SPEC.layers)
    writer.add_context_length(SPEC.context)
    writer.add_embedding_length(SPEC.width)
    writer.add_feed_forward_length(SPEC.hidden_width)
    writer.add_head_count(SPEC.heads)
    writer.add_head_count_kv(SPEC.key_value_heads)
    writer.add_layer_norm_rms_eps(SPEC.norm_epsilon)
    writer.add_rope_freq_base(SPEC.rope_theta)
    tokens, types, merges = tokenizer_parts()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(facts.pop("rule", "smollm")))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(258)
    if facts.pop("rope_freqs", False):
        writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
    for key, value in facts.items():
        writer.add_uint32(f"llama.{key}", value)
    back = {their: our for our, their in NAMES.items()}
    for name in family.tensors(SPEC):
        values = make(name)
        for kind, heads in (("q_proj", SPEC.heads), ("k_proj", SPEC.key_value_heads)):
            if turned and kind in name:
                by_head = values.view(heads, 2, -1, SPEC.width)
                values = by_head.transpose(1, 2).reshape(values.shape)
        stem, _, end = name.rpartition(".")
        if stem.startswith("model.layers."):
            number, _, module = stem.removeprefix("model.layers.").partition(".")
            stem = f"blk.{number}.{back[module]}"
        else:
            stem = back[stem]
        writer.add_tensor(f"{stem}.{end}", values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_each_weight_is_that_of_the_model(folder: Path, comm: MPI.Intracomm) -> None:
    if comm.rank == 0:
        write(folder / "model.gguf")
    comm.Barrier()
    import_model(folder / "model.gguf", folder / "imported", comm, QUIET)
    loaded = load_trained(folder / "imported", comm, QUIET)
    expected = weights_of(SPEC.replace(vocab_size=300))
    for name, weight in loaded.model.named_weights():
        assert torch.equal(weight.detach(), expected[name]), name
    assert loaded.tokenizer.end_of_text == "<|im_end|>"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"architecture": "mamba"}, "is of the architecture 'mamba'; mpillm reads GGUF files of"),
        ({"expert_count": 8}, r"llama\.expert_count = 8 is not read"),
        ({"rope.dimension_count": 4}, "rotates 4 of the 8 features of a head"),
        ({"rope.scaling.type": 3}, r"rope\.scaling\.type = 3 is not read"),
        ({"rope_freqs": True}, r"scales its rotary positions by rope_freqs\.weight"),
        ({"rule": "tekken"}, "with the rule 'tekken'; mpillm reads the kind gpt2 with the rules"),
    ],
)
def test_what_is_not_read_is_refused(
    folder: Path, comm: MPI.Intracomm, facts: dict[str, Any], words: str
) -> None:
    if comm.rank == 0:
        write(folder / "model.gguf", **facts)
    comm.Barrier()
    with pytest.raises(CheckpointError, match=words):
        import_model(folder / "model.gguf", folder / "imported", comm, QUIET)


def test_gpt2_s_rule_is_that_of_our_own_tokenizers() -> None:
    ours = train_bpe([TEXT * 20], 300)
    spec = json.loads(ours.to_json())
    vocabulary = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    pairs = spec["model"]["merges"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    types = [CONTROL if token == ours.end_of_text else 1 for token in vocabulary]
    made = Tokenizer.from_json(
        gguf_tokenizer(GgufVocabulary("gpt2", "gpt-2", vocabulary, types, merges))
    )
    assert made.encode(TEXT) == ours.encode(TEXT)


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("gpt-2", ["It", "'s", " 2026", ":", " 12", " users"]),
        ("smollm", ["It", "'s", " ", "2", "0", "2", "6", ":", " ", "1", "2", " users"]),
        ("llama-bpe", ["It", "'s", " ", "202", "6", ":", " ", "12", " users"]),
        ("qwen2", ["It", "'s", " ", "2", "0", "2", "6", ":", " ", "1", "2", " users"]),
    ],
)
def test_each_rule_splits_as_published(rule: str, pieces: list[str]) -> None:
    found = RULES[rule]().pre_tokenize_str("It's 2026: 12 users")
    assert [piece.replace("Ġ", " ") for piece, _ in found] == pieces


def test_a_run_does_not_start_from_it(folder: Path, comm: MPI.Intracomm) -> None:
    """It has no tokenizer.json that the data could be compared with."""
    if comm.rank == 0:
        write(folder / "model.gguf")
    comm.Barrier()
    with pytest.raises(
        MismatchError, match=r"is a GGUF file; make a checkpoint of it first \(mpill"
    ):
        open_model(GgufSource(folder / "model.gguf"), comm, QUIET)
