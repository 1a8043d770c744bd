"""The spans of documents in their four forms."""

import pytest
import torch

from mpillm.models.layers.document_spans import DocumentSpans
from tests.models.attention_inputs import number_documents, random_lengths


def test_documents_end_with_their_row():
    # The number of the last document of row 0 is that of the first one of row 1.
    spans = DocumentSpans(torch.tensor([[5, 5, 2, 2, 2], [2, 2, 2, 3, 3]]))
    assert spans.lengths == (2, 3, 3, 2)
    assert spans.edges == (0, 2, 5, 8, 10)
    assert spans.runs == ((1, 2), (2, 3), (1, 2))
    assert spans.edges_on_device.tolist() == [0, 2, 5, 8, 10]
    assert spans.edges_on_device.dtype == torch.int32


@pytest.mark.parametrize("seed", range(3))
def test_the_mask_compares_all_pairs(seed):
    documents = number_documents(*(random_lengths(40, 10 * seed + row) for row in range(3)))
    spans = DocumentSpans(documents)
    for row, numbers in enumerate(documents.tolist()):
        expected = [[numbers[t] == numbers[s] and s <= t for s in range(40)] for t in range(40)]
        assert spans.causal_mask[row, 0].tolist() == expected
    assert sum(spans.lengths) == documents.numel()
    assert [n for count, n in spans.runs for _ in range(count)] == list(spans.lengths)


def test_each_position_knows_where_its_document_begins_and_ends():
    spans = DocumentSpans(number_documents([2, 3], [5]))
    assert spans.firsts.tolist() == [[0, 0, 2, 2, 2], [0] * 5]
    assert spans.lasts.tolist() == [[2, 2, 5, 5, 5], [5] * 5]
