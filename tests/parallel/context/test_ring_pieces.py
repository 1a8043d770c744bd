"""Pieces of steps: together the mask of the whole attention, and no mask where nothing is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.models.layers.attention import Pattern, _dense_mask
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.parallel.context import ring_pieces
from mpillm.parallel.context.ring_pieces import make_pieces
from mpillm.parallel.context.ring_steps import step_of
from mpillm.parallel.context.zigzag import own_positions
from tests.models.attention_inputs import number_documents, random_lengths


def covered(ranks, length, pattern, spans, rows=2):
    """Count how often each pair of positions is computed: (B, T, T)."""
    found = torch.zeros(rows, length, length, dtype=torch.int64)
    held = [torch.from_numpy(own_positions(rank, ranks, length)) for rank in range(ranks)]
    for rank in range(ranks):
        for source in range(ranks):
            step = step_of(rank, source, pattern.causal)
            for piece in make_pieces(step, rank, ranks, length, pattern, spans):
                queries, keys = held[rank][piece.queries], held[source][piece.keys]
                mask = torch.ones(len(queries), len(keys), dtype=torch.bool)
                mask = mask.tril() if piece.causal else mask
                if piece.mask_TS is not None:
                    mask = piece.mask_TS.reshape(-1, *mask.shape)
                found[:, queries[:, None], keys] += mask
    return found


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.integers(1, 5),
    length=st.integers(1, 50),
    window=st.sampled_from([0, 0, 1, 4, 9, 70]),
    causal=st.booleans(),
    documents=st.booleans(),
    tile=st.sampled_from([3, 256]),
    seed=st.integers(0, 9),
)
def test_pieces_cover_the_mask_once(ranks, length, window, causal, documents, tile, seed):
    rows = [random_lengths(length, seed + row) for row in range(2)]
    spans = DocumentSpans(number_documents(*rows)) if documents else None
    pattern = Pattern(causal, window)
    like = torch.zeros(2, length, 1, 1)
    mask = _dense_mask(like, pattern, spans)
    wanted = torch.ones(2, length, length) if mask is None else mask.broadcast_to(2, 1, -1, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring_pieces, "TILE", tile)
        found = covered(ranks, length, pattern, spans)
    assert torch.equal(found, wanted.reshape(2, length, length).long())


def test_without_window_and_documents_a_step_is_one_piece():
    for source in range(3):
        (piece,) = make_pieces(step_of(1, source), 1, 3, 60, Pattern())
        assert piece.mask_TS is None
        assert piece.causal == (source == 1)


def test_masks_are_made_only_where_a_document_ends():
    spans = DocumentSpans(number_documents([64, 64], [64, 64]))
    masks = [
        piece.mask_TS
        for source in range(2)
        for piece in make_pieces(step_of(1, source), 1, 2, 128, Pattern(), spans)
        # A chunk with itself is masked for the order.
        if source != 1
    ]
    # Of rank 0's keys, those of the second document are rank 1's later ones.
    assert masks == [None]
    assert len(make_pieces(step_of(1, 1), 1, 2, 128, Pattern(), spans)) == 2


def test_a_window_leaves_far_keys_out():
    pieces = make_pieces(step_of(3, 0), 3, 4, 800, Pattern(window=10))
    assert pieces == []
