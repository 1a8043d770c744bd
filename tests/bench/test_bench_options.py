"""Sizes as people type them, and what is no size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.bench.bench_options import LARGEST_BYTES, MOST_SIZES, parse_sizes
from mpillm.errors import UsageError


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("64", (64,)),
        ("1K:8K", (1024, 2048, 4096, 8192)),
        ("1K:8K:x4", (1024, 4096)),
        ("1M:2M:+512K", (1 << 20, 3 << 19, 2 << 20)),
        ("4M,64,1m", (64, 1 << 20, 4 << 20)),
        ("0.5KiB,1GB", (512, 1 << 30)),
        ("1:4:x1.1", (1, 2, 3, 4)),
        ("2,1:4", (1, 2, 4)),
    ],
)
def test_sizes(text: str, sizes: tuple[int, ...]) -> None:
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a size"),
        ("1K:", "not a size"),
        ("x", "not a size"),
        ("-1", "not a size"),
        ("1e3", "not a size"),
        ("0", "outside 1"),
        ("9999G", "outside 1"),
        ("8K:1K", "ends below its start"),
        ("1:2:x2:3", "4 parts"),
        ("1K:8K:x1", "factor above 1"),
        ("1K:8K:2", "factor above 1"),
        ("1K:8K:+0", "outside 1"),
        ("1:1M:+1", f"more than {MOST_SIZES:,}"),
    ],
)
def test_what_is_no_size(text: str, words: str) -> None:
    with pytest.raises(UsageError, match="--sizes") as caught:
        parse_sizes(text)
    assert words in str(caught.value)


@given(st.text(alphabet="0123456789kmgKMGxib.,:+- ", max_size=24))
def test_any_text_gives_sizes_or_a_usage_error(text: str) -> None:
    try:
        sizes = parse_sizes(text)
    except UsageError:
        return
    assert list(sizes) == sorted(set(sizes))
    assert 1 <= len(sizes) <= MOST_SIZES
    assert all(1 <= size <= LARGEST_BYTES for size in sizes)
