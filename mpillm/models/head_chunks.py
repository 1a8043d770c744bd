"""The chunks of positions in which a loss reads a large head: plain numbers, without torch."""

# Of a chunk's logits. The weight is read, and the sum of its gradient read and written, once a
# chunk. On a CPU that is 667 positions of 50,257 tokens. 64 positions took 1.3 × the time, twice
# as many save 2% (benchmarks/cross_entropy.py).
CPU_CHUNK_BYTES = 128 << 20
# A GPU computes 20 times as many FLOPs for each byte that it reads, so its chunks are longer: the
# product of n positions has n/4 FLOPs for each byte of that sum. Not measured.
GPU_CHUNK_BYTES = 1 << 30
# A float32 logit, or one in 16 bits and its probability. On a CPU the probabilities of a few
# positions exist at a time. The same for each dtype, so that chunks are equally long.
CPU_LOGIT_BYTES, GPU_LOGIT_BYTES = 4, 6
# Half of a second-level cache: a softmax passes over its logits 5 times.
TILE_BYTES = 1 << 20


def chunk_positions(positions: int, vocab_size: int, device: str = "cpu") -> int:
    """Return how many of `positions` a chunk has; the last one may be shorter."""
    nbytes = CPU_CHUNK_BYTES if device == "cpu" else GPU_CHUNK_BYTES
    most = max(1, nbytes // (_logit_bytes(device) * vocab_size))
    # Chunks of equal length: a short last one would move the weight's gradient as a full one does.
    chunks = max(1, -(-positions // most))
    return max(1, -(-positions // chunks))


def tile_positions(positions: int, vocab_size: int, device: str = "cpu") -> int:
    """Return for how many of a chunk's `positions` a softmax is computed at a time."""
    # A GPU wants few large kernels.
    return max(1, TILE_BYTES // (4 * vocab_size)) if device == "cpu" else max(1, positions)


def head_bytes(positions: int, width: int, vocab_size: int, device: str = "cpu") -> int:
    """Estimate the bytes of a chunked loss with its gradients, in float32."""
    # The gradient of the hidden states is there twice: as summed, and times that of the loss.
    own = 4 * width * (2 * positions + vocab_size)
    return chunk_bytes(positions, vocab_size, device) + own


def chunk_bytes(positions: int, vocab_size: int, device: str = "cpu") -> int:
    """Return the bytes of the logits of one chunk."""
    return chunk_positions(positions, vocab_size, device) * vocab_size * _logit_bytes(device)


def _logit_bytes(device: str) -> int:
    return CPU_LOGIT_BYTES if device == "cpu" else GPU_LOGIT_BYTES
