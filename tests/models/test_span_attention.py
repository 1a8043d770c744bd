"""Attention by spans, compared with the dense mask."""

import pytest
import torch

from mpillm.models.layers.dense_attention import attend_dense
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.models.layers.span_attention import attend_spans
from tests.models.attention_inputs import compute, make_qkv, number_documents, random_lengths

ROWS = {
    "random": [random_lengths(96, seed) for seed in range(3)],
    "one token each": [[1] * 96] * 2,
    "one token between": [[40, 1, 1, 54], [1, 94, 1]],
    "the whole row": [[96]] * 2,
    "equal": [[32] * 3, [32, 16, 16, 32]],
}


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_outputs_and_gradients_are_those_of_the_dense_mask(rows, kv_heads):
    spans = DocumentSpans(number_documents(*rows))
    given = make_qkv(len(rows), 96, kv_heads=kv_heads)
    found = compute(lambda *qkv: attend_spans(*qkv, spans), *given)
    expected = compute(lambda *qkv: attend_dense(*qkv, spans.causal_mask), *given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_a_row_do_not_depend_on_other_rows(dtype):
    rows = [*ROWS["equal"], *ROWS["the whole row"], *ROWS["random"], *ROWS["one token each"]]
    *qkv, grad = make_qkv(len(rows), 96, kv_heads=2, dtype=dtype)
    whole = DocumentSpans(number_documents(*rows))
    found = compute(lambda *given: attend_spans(*given, whole), *qkv, grad)
    for row, lengths in enumerate(rows):
        alone = DocumentSpans(number_documents(lengths))
        own = [x[row : row + 1].detach().requires_grad_() for x in qkv]
        single = compute(
            lambda *given, alone=alone: attend_spans(*given, alone), *own, grad[row : row + 1]
        )
        for one, other in zip(single, found, strict=True):
            assert torch.equal(one[0], other[row])


def test_no_call_sees_more_than_a_document(monkeypatch):
    shapes = []

    def note(q, k, v, mask=None, causal=True):
        shapes.append((tuple(q.shape[:2]), mask))
        return attend_dense(q, k, v, mask)

    monkeypatch.setattr("mpillm.models.layers.window_attention.attend_dense", note)
    *qkv, _ = make_qkv(2, 96)
    attend_spans(*qkv, DocumentSpans(number_documents(*ROWS["equal"])))
    assert shapes == [((4, 32), None), ((2, 16), None), ((1, 32), None)]
