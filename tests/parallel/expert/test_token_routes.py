"""Routes of tokens to the owners of experts, compared with a list that is sorted."""

import numpy as np
import pytest

from mpillm.parallel.expert.token_routes import TokenRoutes


def counts(ranks: int, experts: int, seed: int) -> np.ndarray:
    """Draw unequal counts; some experts, and one rank, have no row."""
    draw = np.random.default_rng(seed)
    found = draw.integers(0, 7, (ranks, experts)) * draw.integers(0, 2, (ranks, experts))
    found[draw.integers(ranks)] = 0
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("owned", [1, 3])
def test_each_row_has_its_place_in_the_order_of_expert_and_sender(ranks: int, owned: int) -> None:
    for seed in range(20):
        counts_RE = counts(ranks, ranks * owned, seed)
        routes = TokenRoutes(counts_RE)
        rows = [
            [(expert, rank, n) for expert in range(ranks * owned) for n in range(own[expert])]
            for rank, own in enumerate(counts_RE)
        ]
        inboxes: list[dict[int, tuple[int, int, int]]] = [{} for _ in range(ranks)]
        for rank in range(ranks):
            for piece in routes.to_owners(rank):
                for n in range(piece.rows):
                    assert piece.received + n not in inboxes[piece.peer]
                    inboxes[piece.peer][piece.received + n] = rows[rank][piece.sent + n]
        back: list[dict[int, tuple[int, int, int]]] = [{} for _ in range(ranks)]
        for owner in range(ranks):
            own = range(owner * owned, (owner + 1) * owned)
            expected = sorted(row for each in rows for row in each if row[0] in own)
            arrived = inboxes[owner]
            assert [arrived[n] for n in range(len(arrived))] == expected
            assert sum(routes.counts_of(owner)) == len(expected)
            for piece in routes.to_senders(owner):
                for n in range(piece.rows):
                    back[piece.peer][piece.received + n] = arrived[piece.sent + n]
        # As many rows come back as went out, each to its place.
        assert [[each[n] for n in range(len(each))] for each in back] == rows
        longest = max(map(len, [*rows, *inboxes]))
        assert routes.most_rows == longest
        assert routes.block_rows.sum() == counts_RE.sum()
