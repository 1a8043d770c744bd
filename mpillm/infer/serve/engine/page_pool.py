"""The pages of a key/value cache: counted references, and prefixes that texts share.

Neither torch nor MPI: a page is a number, and rank 0 alone counts. Only full pages are shared, so
none is ever copied to be written (Kwon et al. 2023, "PagedAttention", section 4.4).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

import numpy as np

PageKey = bytes
"""Names a full page by its tokens and all those ahead of it."""
# Of BLAKE2b. Two texts that gave one key would read each other's: 2^64 pages make that likely.
KEY_BYTES = 16
ROOT: PageKey = b""


def page_keys(
    tokens: Sequence[int], page_tokens: int, known: Sequence[PageKey] = ()
) -> list[bytes]:
    """Return the keys of the full pages of `tokens`, of which the first are `known`."""
    keys = list(known)
    for page in range(len(keys), len(tokens) // page_tokens):
        own = np.array(tokens[page * page_tokens : (page + 1) * page_tokens], np.int64).tobytes()
        ahead = keys[-1] if keys else ROOT
        keys.append(hashlib.blake2b(ahead + own, digest_size=KEY_BYTES).digest())
    return keys


class PagePool:
    """Pages number 0 to `pages` − 1, each of which is in use, kept for its prefix, or free."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        """Make a pool with all pages free; `page_tokens`: of each."""
        self.pages, self.page_tokens = pages, page_tokens
        self._references = [0] * pages
        # The lowest number comes first, so that the pages of a text follow each other in memory.
        self._free = OrderedDict.fromkeys(range(pages))
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Pages without references whose tokens are known, the least recently used one first."""
        self._page_of: dict[PageKey, int] = {}
        self._key_of: dict[int, PageKey] = {}

    @property
    def used(self) -> int:
        """The pages that texts refer to."""
        return self.pages - self.available

    @property
    def available(self) -> int:
        """The pages that `take` can give: free ones, and those that are kept for their prefix."""
        return len(self._free) + len(self._kept)

    def share(self, keys: Sequence[PageKey]) -> list[int]:
        """Return the pages of the longest known prefix of `keys`, and refer to them."""
        found: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        for page in found:
            self._kept.pop(page, None)
            self._references[page] += 1
        return found

    def take(self, count: int) -> list[int] | None:
        """Return `count` pages for one text; None where fewer are available."""
        if count > self.available:
            return None
        found = list(islice(self._free, count))
        for page in found:
            del self._free[page]
        while len(found) < count:
            page, _ = self._kept.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            found.append(page)
        for page in found:
            self._references[page] = 1
        return found

    def name(self, page: int, key: PageKey) -> None:
        """Note that a page in use is full, so that other texts find it by `key`."""
        assert self._references[page], "a page without a text is not written"
        # Two texts that were computed side by side have the same tokens in two pages.
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """Drop a text's references to its pages, which are in the order of its tokens."""
        # The last page first: a page is found through those ahead of it, so these stay longer.
        for page in reversed(pages):
            assert self._references[page], "a page is released once for each reference"
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._key_of:
                self._kept[page] = None
            else:
                self._free[page] = None

    def forget(self) -> None:
        """Drop all known prefixes."""
        for page in self._kept:
            self._free[page] = None
        self._kept.clear()
        self._page_of.clear()
        self._key_of.clear()
