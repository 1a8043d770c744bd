"""Errors of torch in the words of a user: memory that is not there, ids that the model lacks."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mpillm.errors import DataError

# torch raises RuntimeError for both, on the CPU and on a GPU.
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)
_NO_SUCH_ID = re.compile(r"index out of range in self|index \d+ is out of bounds")


@contextmanager
def torch_explained() -> Iterator[None]:
    """Run the block; raise MemoryError and DataError where torch means them."""
    try:
        yield
    except (RuntimeError, IndexError) as failure:
        text = str(failure)
        if _NO_MEMORY.search(text):
            asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", text)
            wanted = f"torch asked for {asked[1]}" if asked else "torch asked for more than is free"
            raise MemoryError(wanted) from failure
        if _NO_SUCH_ID.search(text):
            raise DataError(
                "a token id is not in the model's vocabulary: a shard is damaged; "
                "find it with `mpillm prepare --verify`, or prepare the dataset again"
            ) from failure
        raise
