"""Algorithms proven without MPI: every schedule is run symbolically, for 1 to 64 ranks."""

from collections import Counter
from itertools import count as counting
from itertools import pairwise, product

import pytest
from mpi4py import MPI

from mpillm.comm.algorithms.algorithm_catalog import (
    ALGORITHM_CATALOG,
    algorithms_of,
    load_algorithm,
    schedule,
)
from mpillm.comm.algorithms.schedule import Algorithm, Transfer, block_bounds
from mpillm.comm.algorithms.trees import scattered_owners, tree_split
from mpillm.comm.selection import OPERATIONS
from mpillm.errors import CommError, UsageError

pytestmark = pytest.mark.slow("proves every algorithm for up to 64 ranks, each the root")
SIZES = [*range(1, 19), 24, 31, 32, 33, 48, 63, 64]
# Under mpirun the ranks share the longer proofs; one that fails ends the job.
SHARE = SIZES[MPI.COMM_WORLD.rank :: MPI.COMM_WORLD.size]
PAIRS = [
    (operation, algorithm) for operation in OPERATIONS for algorithm in algorithms_of(operation)
]
IN_PLACE = [pair for pair in PAIRS if pair[0] != "alltoall"]


def schedules(operation, algorithm, size, root=0):
    return [schedule(operation, algorithm, rank, size, root) for rank in range(size)]


def cases(operation):
    """(size, root): every size, and the roots that may differ from one another."""
    for size in SHARE:
        rooted = operation in ("broadcast", "reduce")
        yield from (
            (size, root) for root in (sorted({0, 1 % size, size // 2, size - 1}) if rooted else [0])
        )


class Sums:
    """Symbolic sums: a value is (bits of the ranks in it, number of its expression); a + b and b +
    a are one.
    """

    def __init__(self):
        self.numbers = {}
        self.fresh = counting()

    def leaf(self, rank):
        return 1 << rank, self.number(rank)

    def number(self, key):
        return self.numbers.setdefault(key, next(self.fresh))

    def add(self, a, b):
        assert not a[0] & b[0], "a rank would be added twice"
        return a[0] | b[0], self.number(("sum", frozenset((a[1], b[1]))))

    def canonical(self, lo, hi):
        if hi - lo == 1:
            return self.leaf(lo)
        mid = tree_split(lo, hi)
        return self.add(self.canonical(lo, mid), self.canonical(mid, hi))


def execute(plans, state, sums):
    """Run all ranks' rounds in lock-step on `state[rank][block]`; sends carry what the earlier
    rounds left.
    """
    for turn in range(max(len(plan.rounds) for plan in plans)):
        before = [list(blocks) for blocks in state]
        for rank, plan in enumerate(plans):
            for transfer in plan.rounds[turn] if turn < len(plan.rounds) else ():
                for block in range(transfer.block, transfer.block + transfer.width):
                    came = before[transfer.peer][block]
                    if transfer.action == "add":
                        state[rank][block] = sums.add(state[rank][block], came)
                    elif transfer.action == "copy":
                        state[rank][block] = came
    return state


def run(operation, algorithm, size, root=0):
    """(state at the end, what the whole is) of an operation over leaves; what is not right at first
    is None.
    """
    plans, sums = schedules(operation, algorithm, size, root), Sums()
    blocks = plans[0].blocks
    if operation == "allgather":
        state = [
            [sums.leaf(b) if b == rank else None for b in range(blocks)] for rank in range(size)
        ]
    elif operation == "broadcast":
        state = [
            [sums.leaf(b) if rank == root else None for b in range(blocks)] for rank in range(size)
        ]
    else:
        state = [[sums.leaf(rank)] * blocks for rank in range(size)]
    return execute(plans, state, sums), sums


@pytest.mark.parametrize(("operation", "algorithm"), IN_PLACE)
def test_each_ends_with_what_the_operation_says(operation, algorithm):
    for size, root in cases(operation):
        whole = (1 << size) - 1
        state, sums = run(operation, algorithm, size, root)
        if operation in ("allgather", "broadcast"):
            assert state == [[sums.leaf(block) for block in range(len(state[0]))]] * size
        elif operation == "allreduce":
            assert all(value[0] == whole for blocks in state for value in blocks)
            assert all(blocks == state[0] for blocks in state)  # bitwise the same on each
        elif operation == "reduce_scatter":
            assert all(state[rank][rank][0] == whole for rank in range(size))
        else:
            assert all(value[0] == whole for value in state[root])


@pytest.mark.parametrize(
    ("operation", "algorithm"), [p for p in IN_PLACE if load_algorithm(p[1]).fixed_order]
)
def test_sums_are_taken_in_the_canonical_order(operation, algorithm):
    for size, root in cases(operation):
        state, sums = run(operation, algorithm, size, root)
        whole = sums.canonical(0, size)
        if operation == "allreduce":
            assert all(value == whole for blocks in state for value in blocks)
        elif operation == "reduce_scatter":
            assert all(state[rank][rank] == whole for rank in range(size))
        elif operation == "reduce":
            assert all(value == whole for value in state[root])


def test_the_canonical_order():
    def text(lo, hi):
        return (
            str(lo)
            if hi - lo == 1
            else f"({text(lo, tree_split(lo, hi))}+{text(tree_split(lo, hi), hi)})"
        )

    assert text(0, 5) == "(((0+1)+(2+3))+4)"
    assert text(0, 6) == "(((0+1)+(2+3))+(4+5))"
    assert text(0, 7) == "(((0+1)+(2+3))+((4+5)+6))"


def test_the_ring_sums_in_another_order():
    """The check of the order can fail; each block of a ring is summed from another rank on."""
    state, sums = run("allreduce", "ring", 4)
    assert all(value != sums.canonical(0, 4) for value in state[0])


@pytest.mark.parametrize("size", SIZES)
def test_alltoall_turns_the_matrix(size):
    got = [{rank: (rank, rank)} for rank in range(size)]
    for turn in range(size - 1):
        rounds = [plan.rounds[turn] for plan in schedules("alltoall", "pairwise", size)]
        sent = {
            (rank, t.peer): t.block
            for rank, r in enumerate(rounds)
            for t in r
            if t.action == "send"
        }
        for rank, transfers in enumerate(rounds):
            for transfer in (t for t in transfers if t.action == "copy"):
                assert transfer.block not in got[rank]
                got[rank][transfer.block] = (transfer.peer, sent.pop((transfer.peer, rank)))
        assert not sent
    assert got == [{source: (source, rank) for source in range(size)} for rank in range(size)]


@pytest.mark.parametrize(("operation", "algorithm"), PAIRS)
def test_both_ends_agree(operation, algorithm):
    """Each send has a receive of as many blocks in the same round, in one order for each pair of
    ranks.

    Both ends know whether it is added there.
    """
    for size, root in cases(operation):
        plans = schedules(operation, algorithm, size, root)
        assert len({plan.blocks for plan in plans}) == 1
        for turn in range(max(len(plan.rounds) for plan in plans)):
            ends, kinds = {"send": {}, "receive": {}}, {}
            for rank, plan in enumerate(plans):
                for t in plan.rounds[turn] if turn < len(plan.rounds) else ():
                    assert t.peer != rank
                    way = (rank, t.peer) if t.action == "send" else (t.peer, rank)
                    end = ends["send" if t.action == "send" else "receive"]
                    assert kinds.setdefault((*way, t.action == "send"), t.action) == t.action
                    assert t.action == "send" or t.added == (t.action == "add")
                    end.setdefault(way, []).append(
                        (t.block if operation != "alltoall" else None, t.width, t.added)
                    )
            assert ends["send"] == ends["receive"]
            assert operation == "alltoall" or all(
                spans == sorted(spans) for spans in ends["send"].values()
            )


@pytest.mark.parametrize(("operation", "algorithm"), IN_PLACE)
def test_no_two_touch_a_block_at_once(operation, algorithm):
    """In a round a block is written once; sent and written only as one whole exchange, and never
    copied over.
    """
    for size, root in cases(operation):
        for plan in schedules(operation, algorithm, size, root):
            for transfers in plan.rounds:
                written = [
                    b
                    for t in transfers
                    if t.action != "send"
                    for b in range(t.block, t.block + t.width)
                ]
                assert len(written) == len(set(written))
                for sent in (t for t in transfers if t.action == "send"):
                    for other in (t for t in transfers if t.action != "send"):
                        if (
                            sent.block < other.block + other.width
                            and other.block < sent.block + sent.width
                        ):
                            assert (sent.block, sent.width, "add") == (
                                other.block,
                                other.width,
                                other.action,
                            )


def stuck(lists):
    """List the ranks that never end.

    A send completes only with its receive, a round only with all its transfers.
    """
    at, posted = [0] * len(lists), Counter()

    def ways(rank):
        for t in lists[rank][at[rank]]:
            yield ("send", rank, t.peer) if t.action == "send" else ("receive", t.peer, rank)

    def matched(end, sender, receiver):
        other = "receive" if end == "send" else "send"
        return posted[other, sender, receiver] >= posted[end, sender, receiver]

    busy = waking = [rank for rank in range(len(lists)) if lists[rank]]
    while waking:
        posted.update(way for rank in waking for way in ways(rank))
        ended = [rank for rank in busy if all(matched(*way) for way in ways(rank))]
        for rank in ended:
            at[rank] += 1
        busy = [rank for rank in busy if at[rank] < len(lists[rank])]
        waking = [rank for rank in ended if rank in busy]
    return busy


@pytest.mark.parametrize(("operation", "algorithm"), PAIRS)
def test_no_circle_of_waiting(operation, algorithm):
    for size, root in cases(operation):
        assert stuck([plan.rounds for plan in schedules(operation, algorithm, size, root)]) == []


def test_a_planted_circle_is_found():
    send, receive = (Transfer(1, 0, "send"),), (Transfer(1, 0, "copy"),)
    back, front = (Transfer(0, 0, "send"),), (Transfer(0, 0, "copy"),)
    assert stuck([[send, receive], [front, back]]) == []
    assert stuck([[send, receive], [back, front]]) == [0, 1]
    rings = [list(plan.rounds) for plan in schedules("allreduce", "ring", 4)]
    rings[2].pop(0)
    assert stuck(rings)


def sent_elements(operation, algorithm, rank, size, count):
    return schedule(operation, algorithm, rank, size).sent_elements(count)


def total_sent(operation, algorithm, size, count):
    """Count the elements that all ranks together send for `count`, by the literature's formulas;
    root 0.

    To sum n elements of p ranks, or to spread them, takes at least (p−1)n, and an all-reduce twice
    that (Patarasuk and Yuan 2009); ring, rabenseifner and binomial need no more. Recursive doubling
    sends n log2(p) a rank at powers of two (Thakur, Rabenseifner, Gropp 2005); see `doubling_sent`
    for others. A binomial scatter or gather carries a block once for each bit set in the number of
    its owner: n log2(p)/2 in all at powers of two.
    """
    least = (size - 1) * count
    if operation != "allreduce":
        walks = (operation, algorithm) in (
            ("broadcast", "scatter-allgather"),
            ("reduce", "rabenseifner"),
        )
        return least + (walked(size, count, algorithm == "rabenseifner") if walks else 0)
    return doubling_sent(size) * count if algorithm == "recursive-doubling" else 2 * least


def walked(size, count, scattered):
    bounds = block_bounds(count, size)
    owners = scattered_owners(size) if scattered else range(size)
    return sum((bounds[b + 1] - bounds[b]) * owner.bit_count() for b, owner in enumerate(owners))


def doubling_sent(size):
    """Count whole arrays sent in recursive doubling, from the bits of p = 2^a0 + … + 2^am, a0 the
    lowest.

    Each of the m + 1 even subtrees doubles by itself: ai · 2^ai sends. Their m joins pair 2^a0,
    2^(a0+1), … ranks, with two sends a pair. That leaves 2^(a0+m) ranks with the sum, and one send
    for each other rank.
    """
    bits = [bit for bit in range(size.bit_length()) if size >> bit & 1]
    joins = len(bits) - 1
    lowest = 1 << bits[0]
    return (
        sum(bit << bit for bit in bits) + 2 * lowest * ((1 << joins) - 1) + size - (lowest << joins)
    )


@pytest.mark.parametrize(("operation", "algorithm"), PAIRS)
def test_elements_sent(operation, algorithm):
    for size, count in product(SHARE, (0, 1, 5, 100, 1003)):
        if operation == "alltoall":
            count *= size
        total = sum(sent_elements(operation, algorithm, rank, size, count) for rank in range(size))
        assert total == total_sent(operation, algorithm, size, count)


@pytest.mark.parametrize("size", SIZES)
def test_the_formulas_of_the_papers(size):
    count = 6 * size
    for rank in range(size):
        assert sent_elements("allreduce", "ring", rank, size, count) == 2 * (size - 1) * 6
        assert sent_elements("alltoall", "pairwise", rank, size, count) == (size - 1) * 6
        if size.bit_count() == 1:
            doublings = size.bit_length() - 1
            assert (
                sent_elements("allreduce", "recursive-doubling", rank, size, count)
                == doublings * count
            )
            assert (
                sent_elements("allreduce", "rabenseifner", rank, size, count) == 2 * (size - 1) * 6
            )
    if size.bit_count() == 1:
        assert (
            total_sent("broadcast", "scatter-allgather", size, count)
            == (size - 1) * count + doublings * count / 2
        )
    assert total_sent("allreduce", "rabenseifner", size, count) == 2 * (size - 1) * count


@pytest.mark.parametrize("size", SIZES)
def test_rounds_are_few(size):
    doublings = (size - 1).bit_length()

    def rounds(operation, algorithm):
        return len(schedule(operation, algorithm, size - 1, size).rounds)

    assert rounds("allreduce", "ring") == 2 * (size - 1)
    assert rounds("allreduce", "rabenseifner") == rounds("allreduce", "binomial") == 2 * doublings
    assert (
        rounds("reduce_scatter", "recursive-halving")
        == rounds("allgather", "recursive-doubling")
        == doublings
    )
    assert rounds("allreduce", "recursive-doubling") <= (
        doublings if size.bit_count() == 1 else 2 * doublings
    )


@pytest.mark.parametrize("size", [2, 8, 64])
def test_one_message_each_way_in_a_round(size):
    """At powers of two what rabenseifner sends to a partner is one piece."""
    for plan in schedules("allreduce", "rabenseifner", size):
        assert all(
            sorted(t.action == "send" for t in transfers) == [False, True]
            for transfers in plan.rounds
        )


def test_an_unknown_algorithm():
    with pytest.raises(
        UsageError, match="no collective algorithm is called 'rign', did you mean ring"
    ):
        schedule("allreduce", "rign", 0, 2)
    with pytest.raises(
        CommError, match=r"ring cannot run broadcast.*take one of binomial, scatter-"
    ):
        schedule("broadcast", "ring", 0, 2)


def test_a_plugin_is_an_algorithm_of_any_package():
    plan = schedule("allreduce", "mpillm.comm.algorithms.ring:RING", 1, 4)
    assert plan == schedule("allreduce", "ring", 1, 4)
    with pytest.raises(
        CommError, match="is of type function; a collective algorithm is an Algorithm"
    ):
        schedule("allreduce", "mpillm.comm.algorithms.ring:allreduce", 0, 2)


def test_the_catalogue():
    assert all(isinstance(load_algorithm(name), Algorithm) for name in ALGORITHM_CATALOG)
    # In this order: of equally fast ones, a cluster's profile takes the first.
    assert algorithms_of("allreduce") == (
        "ring",
        "recursive-doubling",
        "rabenseifner",
        "binomial",
    )
    assert algorithms_of("barrier") == ()


@pytest.mark.parametrize("count", [0, 1, 5, 64, 2**31 + 5])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_bounds(count, size):
    bounds = block_bounds(count, size)
    lengths = [stop - first for first, stop in pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(bounds)) == (0, count, size + 1)
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("inner", ["segmented-ring", "recursive-doubling", "rabenseifner"])
def test_two_levels_add_each_rank_once(inner):
    """Within each node the team's tree, then a list between the ranks of equal place: dispatch.py's
    two-level, whose order is the canonical one where nodes hold 2^k neighbours and the list keeps
    it.
    """
    for nodes, each in ((n, k) for n in (2, 3, 5, 8, 16) for k in (1, 2, 3, 4, 7) if n * k <= 64):
        sums = Sums()
        # Each rank of a node has its stripe of the node's sum; all stripes of a node are alike,
        # symbolically.
        of_node = [sums.canonical(node * each, (node + 1) * each) for node in range(nodes)]
        plans = schedules("allreduce", inner.removeprefix("segmented-"), nodes)
        state = execute(plans, [[value] * plans[0].blocks for value in of_node], sums)
        assert all(value[0] == (1 << nodes * each) - 1 for blocks in state for value in blocks)
        if each & (each - 1) == 0 and inner in ("recursive-doubling", "rabenseifner"):
            assert all(
                value == sums.canonical(0, nodes * each) for blocks in state for value in blocks
            )
