"""A toy collective algorithm: an all-reduce as a star, through rank 0."""

from mpillm.comm.algorithms.schedule import Algorithm, Round, Transfer


def allreduce(rank: int, size: int, root: int) -> list[Round]:
    """Gather on rank 0 block by block, then spread: two rounds a rank, in a star."""
    if rank:
        blocks = range(size)
        return [
            tuple(Transfer(0, block, "send", added=True) for block in blocks),
            tuple(Transfer(0, block, "copy") for block in blocks),
        ]
    gathered: list[Round] = [
        tuple(Transfer(other, block, "add", added=True) for block in range(size))
        for other in range(1, size)
    ]
    spread: list[Round] = [
        tuple(Transfer(other, block, "send") for block in range(size)) for other in range(1, size)
    ]
    return gathered + spread


STAR = Algorithm({"allreduce": allreduce})
