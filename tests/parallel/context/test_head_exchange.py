"""Attention with exchanged heads against attention of one process: outputs and gradients."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.models.layers.attention import Pattern
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.parallel.context.context_traffic import attention_bytes
from mpillm.parallel.context.head_exchange import HeadExchange
from tests.models.attention_inputs import number_documents, random_lengths
from tests.parallel.context.context_inputs import axis_of, largest_error


@pytest.fixture
def exchange(comm):
    made = HeadExchange(axis_of(comm))
    yield made
    made.close()


# Every rank draws the same.
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 100),
    grouped=st.sampled_from([1, 2]),
    rows=st.integers(1, 3),
    window=st.sampled_from([0, 7]),
    causal=st.booleans(),
    documents=st.booleans(),
)
def check(exchange, comm, length, grouped, rows, window, causal, documents):
    spans = None
    if documents:
        lengths = [random_lengths(length, row) for row in range(rows)]
        spans = DocumentSpans(number_documents(*lengths))
    exchange.length = length
    shape = rows, length, 2 * comm.size * grouped, 2 * comm.size, 16
    assert largest_error(exchange.attend, comm, shape, Pattern(causal, window), spans) <= 1e-6


def test_outputs_and_gradients_are_those_of_one_process(exchange, comm):
    check(exchange, comm)


def test_bytes_are_those_of_the_formula(exchange, comm):
    length, heads = 24 * comm.size, (2 * comm.size, comm.size, 16)
    exchange.length = length
    largest_error(exchange.attend, comm, (3, length, *heads), Pattern())
    wanted = 3 * sum(attention_bytes("ulysses", comm.size, heads, length))
    assert exchange.moved_bytes == wanted
