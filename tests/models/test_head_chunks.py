import pytest

from mpillm.models.decoder import SHAPES
from mpillm.models.head_chunks import (
    CPU_CHUNK_BYTES,
    chunk_positions,
    head_bytes,
    tile_positions,
)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("vocabulary", [1, 257, 50_257, 128_256, 10**9])
@pytest.mark.parametrize("positions", [0, 1, 1000, 4096, 10**6])
def test_equal_chunks_cover_all_positions(positions: int, vocabulary: int, device: str) -> None:
    count = chunk_positions(positions, vocabulary, device)
    chunks = -(-positions // count)
    assert positions <= chunks * count <= positions + max(0, chunks - 1)
    assert tile_positions(count, vocabulary, device) >= 1


def test_a_chunk_has_a_bounded_number_of_bytes() -> None:
    assert chunk_positions(10**6, 50_257) * 50_257 * 4 <= CPU_CHUNK_BYTES
    assert chunk_positions(4096, 257) == 4096
    assert chunk_positions(10, 10**12) == 1
    assert tile_positions(4096, 257, "cuda") == 4096


def test_the_estimate_counts_a_chunk_and_two_gradients() -> None:
    chunk = chunk_positions(4096, 50_257) * 50_257 * 4
    assert head_bytes(4096, 768, 50_257) == chunk + 2 * 4096 * 768 * 4 + 50_257 * 768 * 4
    model = SHAPES["gpt2-124m"]
    assert model.output_bytes(4) == head_bytes(4 * 1024, 768, 50_257)
    assert model.output_bytes(4) < 0.2 * 2 * 4 * 1024 * 50_257 * 4
