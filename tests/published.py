"""A small published model in a Hugging Face folder, written as transformers does."""

import json
from pathlib import Path

import torch

from mpillm.models.block_settings import BlockSettings
from mpillm.models.decoder import DecoderConfig
from mpillm.models.families.family_catalog import family_of
from mpillm.models.part_module import create
from mpillm.tokens.tokenizer import byte_tokenizer
from mpillm.weights.published_model import their_tensors

SPEC = DecoderConfig(
    layers=2, width=32, heads=4, kv_heads=2, hidden=64, context=32, vocab_size=300, tied=False
)
GPT2 = DecoderConfig(
    layers=2,
    width=32,
    heads=4,
    context=32,
    vocab_size=300,
    norm="layernorm",
    positions="learned",
    activation="gelu",
    bias=True,
)


def weights_of(spec: BlockSettings) -> dict[str, torch.Tensor]:
    """Return the weights of the model, by our names."""
    return {name: weight.detach() for name, weight in create(spec, 7).named_weights()}


def publish(folder: Path, spec: BlockSettings = SPEC, **more: torch.Tensor) -> Path:
    """Write the model in bfloat16, with `more` tensors."""
    from safetensors.torch import save_file

    family = family_of(spec)
    make = their_tensors(family, spec, weights_of(spec).__getitem__)
    tensors = {name: make(name).bfloat16() for name in family.tensors(spec)}
    folder.mkdir()
    save_file({**tensors, **more}, folder / "model.safetensors")
    config = {**family.config(spec), "eos_token_id": 256, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_json())
    return folder
