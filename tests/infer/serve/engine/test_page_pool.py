"""Pages are counted, shared by prefix, and evicted, the least recently used first."""

import random

from mpillm.infer.serve.engine.page_pool import PagePool, page_keys


def test_keys_depend_on_all_tokens_ahead() -> None:
    keys = page_keys([1, 2, 3, 4, 5], 2)
    assert len(keys) == 2
    assert page_keys([1, 2, 3, 4, 9], 2) == keys
    other = page_keys([7, 2, 3, 4], 2)
    assert other[1] != keys[1]
    assert page_keys([1, 2, 3, 4, 5, 6], 2, keys) == page_keys([1, 2, 3, 4, 5, 6], 2)


def test_full_pages_are_shared_and_outlive_their_text() -> None:
    pool = PagePool(4, 2)
    keys = page_keys([1, 2, 3, 4], 2)
    pages = pool.take(2)
    assert pages == [0, 1]
    for page, key in zip(pages, keys, strict=True):
        pool.name(page, key)
    assert pool.share(keys) == pages
    pool.release(pages)
    assert pool.used == 2
    pool.release(pages)
    assert pool.used == 0
    # Kept pages are found again, and free ones are taken ahead of them.
    assert pool.take(2) == [2, 3]
    assert pool.share(keys) == pages
    assert pool.take(1) is None


def test_the_end_of_a_prefix_is_evicted_first() -> None:
    pool = PagePool(3, 1)
    keys = page_keys([1, 2, 3], 1)
    pages = pool.take(3)
    assert pages is not None
    for page, key in zip(pages, keys, strict=True):
        pool.name(page, key)
    pool.release(pages)
    assert pool.take(1) == [pages[2]]
    assert pool.share(keys) == pages[:2]


def test_forgotten_prefixes_are_free_pages() -> None:
    pool = PagePool(2, 1)
    pages = pool.take(2)
    assert pages is not None
    pool.name(pages[0], b"a")
    pool.release(pages)
    pool.forget()
    assert pool.share([b"a"]) == []
    assert pool.available == 2


def test_random_use_loses_no_page() -> None:
    draw, pool = random.Random(1), PagePool(13, 2)
    held: list[list[int]] = []
    for _ in range(3000):
        if held and draw.random() < 0.45:
            pool.release(held.pop(draw.randrange(len(held))))
            continue
        tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 9))]
        keys = page_keys(tokens, 2)
        shared = pool.share(keys)
        taken = pool.take(len(keys) - len(shared))
        if taken is None:
            pool.release(shared)
            continue
        for page, key in zip([*shared, *taken], keys, strict=True):
            pool.name(page, key)
        held.append([*shared, *taken])
        assert pool.used == len({page for pages in held for page in pages})
    for pages in held:
        pool.release(pages)
    assert pool.used == 0
    assert pool.take(13) is not None
