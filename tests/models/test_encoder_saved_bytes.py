"""What an encoder's settings count for the backward pass is what autograd keeps."""

from typing import Any

import pytest
import torch

from mpillm.bench.tensor_peak import peak_tensor_bytes
from mpillm.models.encoder import SHAPES, EncoderConfig
from mpillm.models.spec import Part
from mpillm.tasks.ctc import CTC
from tests.models.saved_bytes import check_peak, kept_bytes

SIZES = {"layers": 4, "width": 128, "heads": 4, "context": 64}
MODERN = SHAPES["modernbert-tiny"].replace(**SIZES, vocab_size=50, window=16)
BERT = EncoderConfig(**SIZES, vocab_size=50, token_types=2)
KINDS: dict[str, EncoderConfig] = {
    "bert": BERT,
    "bert, dropout": BERT.replace(dropout=0.1, attention_dropout=0.1, embedding_dropout=0.1),
    "rotary": BERT.replace(positions="rotary", token_types=0),
    "modernbert": MODERN,
    "modernbert, wide windows": MODERN.replace(window=60),
    "modernbert, windows that reach all": MODERN.replace(window=200),
    "modernbert, uneven": MODERN.replace(context=70),
    "pre-norm": BERT.replace(norm_place="pre", embedding_norm=False),
    "classes": BERT.replace(head="sequence", head_layer="tanh", classes=5, head_dropout=0.1),
    "mean": MODERN.replace(head="sequence", pooling="mean", classes=5),
    "token": BERT.replace(head="token", head_layer="none", classes=5),
    "span": MODERN.replace(head="span"),
    "hidden states": BERT.replace(head="none", head_layer="none"),
    "images": SHAPES["vit-tiny-digits"].replace(
        layers=4, width=128, image_size=32, patch_size=4, channels=3, classes=10
    ),
    "sound": SHAPES["sound-tiny"].replace(**SIZES, vocab_size=50),
}


def fields_of(config: EncoderConfig, rows: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if config.image_size:
        size = config.image_size, config.image_size
        return {"pixels": torch.randn(rows, config.channels, *size, dtype=dtype)}
    if config.mels:
        return {"frames": torch.randn(rows, 2 * config.context, config.mels, dtype=dtype)}
    return {"ids": torch.zeros(rows, config.context, dtype=torch.int64)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_keep_what_their_settings_count(kind: str, dtype: torch.dtype) -> None:
    config = KINDS[kind]
    for part, rows in ((Part(0, 1), 3), (Part(1, 2), 2), (Part(3, 4), 3)):
        given = fields_of(config, rows, dtype)
        counted = config.activation_bytes(part, rows, dtype.itemsize)
        kept = kept_bytes(config, part, rows, "none", dtype, given)
        # The settings count pixels and frames, too, which are fields of the batch.
        assert counted == pytest.approx(kept, rel=0.06), part


@pytest.mark.parametrize("recompute", ["none", "attention", "full", 2])
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_the_peak_of_a_step_is_what_is_kept_and_one_block(kind: str, recompute: Any) -> None:
    check_peak(KINDS[kind].replace(layers=8, context=128), recompute)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_logits_have_bytes(kind: str) -> None:
    config = KINDS[kind]
    assert config.output_bytes(2) > config.logits_bytes(2) > 0
    assert config.output_bytes(4) > config.output_bytes(2)


def test_the_loss_of_an_alignment_holds_what_its_settings_count() -> None:
    config, rows = KINDS["sound"].replace(vocab_size=2000), 4
    logits = torch.randn(rows, config.context, 2000, requires_grad=True)
    fields = {
        "lengths": torch.full((rows,), config.context),
        "targets": torch.ones(rows, 9, dtype=torch.int64),
        "counts": torch.ones(rows, 9, dtype=torch.bool),
    }

    def step() -> None:
        logits.grad = None
        # The head makes the logits.
        CTC().loss_sum((logits * 1,), fields).backward()

    step()
    assert config.output_bytes(rows) == pytest.approx(peak_tensor_bytes(step), rel=0.3)
