"""Ring attention against that of one process: outputs and gradients, by memory and messages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.machine.node_map import map_nodes
from mpillm.models.layers.attention import Pattern
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.parallel.context.context_traffic import attention_bytes
from mpillm.parallel.context.ring_attention import Ring
from tests.models.attention_inputs import number_documents, random_lengths
from tests.parallel.context.context_inputs import axis_of, largest_error

# Float32, by norms: a rounding a block.
TOLERANCE = 1e-6
NUMBERS = 2 * 3 * 100 * 4 * 16


@pytest.fixture(params=["shared", "messages", "two nodes"])
def ring(request, comm):
    nodes = None
    if request.param == "two nodes":
        if comm.size != 4:
            pytest.skip("two nodes of two ranks need four")
        # As launchers deal them out in turns.
        nodes = [(0, 2), (1, 3)]
    made = Ring(axis_of(comm, nodes), NUMBERS, 4, shares=request.param != "messages")
    # All on one node, but where the tests run on several hosts.
    counts = {"shared": len(map_nodes(comm).nodes), "messages": comm.size, "two nodes": 2}
    assert len(made.memory.nodes) == counts[request.param]
    yield made
    made.close()


# Every rank draws the same.
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 100),
    kv_heads=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 3),
    window=st.sampled_from([0, 0, 7, 40]),
    causal=st.sampled_from([True, True, False]),
    documents=st.booleans(),
    soft_cap=st.sampled_from([0.0, 0.0, 2.0]),
)
def check(ring, comm, length, kv_heads, rows, window, causal, documents, soft_cap):
    spans = None
    if documents:
        lengths = [random_lengths(length, row) for row in range(rows)]
        spans = DocumentSpans(number_documents(*lengths))
    ring.length, shape = length, (rows, length, 4, kv_heads, 16)
    error = largest_error(ring.attend, comm, shape, Pattern(causal, window, soft_cap), spans, 2)
    assert error <= TOLERANCE


def test_outputs_and_gradients_are_those_of_one_process(ring, comm):
    check(ring, comm)


def test_bytes_are_those_of_the_formula(ring, comm):
    length = 24 * comm.size
    ring.length = length
    largest_error(ring.attend, comm, (3, length, 4, 2, 16), Pattern())
    wanted = 3 * sum(attention_bytes("ring", comm.size, (4, 2, 16), length))
    assert ring.memory.moved_bytes == wanted


def test_a_model_of_16_bits_sums_gradients_in_float32(ring, comm):
    generator = torch.Generator().manual_seed(comm.rank)
    q, k, v = (torch.randn(2, 8, 4, 16, generator=generator).bfloat16() for _ in range(3))
    own = [x.requires_grad_() for x in (q, k, v)]
    ring.length = 0
    out = ring.attend(*own)
    grads = torch.autograd.grad(out.float().sum(), own)
    assert [x.dtype for x in (out, *grads)] == [torch.bfloat16] * 4
    # The shares of each query's output add up to 1, so the gradients of v to the queries.
    total = comm.allreduce(float(grads[2].float().sum()))
    assert total == pytest.approx(2 * 8 * 4 * 16 * comm.size, rel=1e-2)
