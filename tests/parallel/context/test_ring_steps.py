"""The steps of ring attention: each pair of chunks once, each step as much work as the others."""

import pytest

from mpillm.parallel.context.ring_steps import chunk_pairs, place_of, sources_of, step_of


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ranks", range(1, 65))
def test_every_pair_of_chunks_once_and_work_even_within_a_block(ranks, causal):
    found = []
    for rank in range(ranks):
        for source in range(ranks):
            pairs = list(chunk_pairs(rank, ranks, step_of(rank, source, causal)))
            # A chunk with itself is half of a block where it is causal.
            work = sum(0.5 if diagonal else 1.0 for *_, diagonal in pairs)
            assert work == (2.0 if causal else 4.0)
            found += [(query, key) for query, key, _ in pairs]
    chunks = range(2 * ranks)
    wanted = [(query, key) for query in chunks for key in chunks if key <= query or not causal]
    assert sorted(found) == wanted


def split(ranks, nodes):
    """Deal ranks out to nodes in turns, as some launchers do."""
    return [list(range(node, ranks, nodes)) for node in range(nodes)]


@pytest.mark.parametrize(
    ("ranks", "count"), [(n, m) for n in range(1, 65) for m in range(1, n + 1) if n % m == 0]
)
def test_every_source_comes_by_and_no_two_ranks_add_to_one_row(ranks, count):
    nodes = split(ranks, count)
    turns = [sources_of(rank, nodes) for rank in range(ranks)]
    for rank, visits in enumerate(turns):
        assert visits[0][0] == rank
        assert sorted(source for sources in visits for source in sources) == list(range(ranks))
    for ranks_of_node in nodes:
        for visit in range(count):
            # The node's keys of one visit are those of one node, each at its own place.
            first = turns[ranks_of_node[0]][visit]
            (home,) = {place_of(source, nodes)[0] for source in first}
            for step in range(len(ranks_of_node)):
                read = [turns[rank][visit][step] for rank in ranks_of_node]
                assert sorted(read) == sorted(nodes[home])
