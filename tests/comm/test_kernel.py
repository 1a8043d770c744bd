"""The compiled kernel beside NumPy and torch: each element type, each reduction, and every 16-bit float there is."""

import numpy as np
import pytest
import torch

from mpillm.comm import kernel
from mpillm.comm.buffers import ELEMENTS, FLOATS, REDUCTIONS, SHORT_FLOATS, WHOLE

HALVES = np.arange(65536, dtype=np.uint16)
COUNTS = (0, 1, 7, 8, 9, 31, 1023, 1024, 1025, 5000)


def as_torch(octets, element):
    return torch.from_numpy(octets.view(np.int16)).view(getattr(torch, element))


@pytest.mark.parametrize("element", SHORT_FLOATS)
def test_every_short_float_is_widened(element):
    wide = np.empty(65536, np.float32)
    kernel.widen(ELEMENTS.index(element), wide, HALVES)
    np.testing.assert_array_equal(wide, as_torch(HALVES, element).float().numpy())


@pytest.mark.parametrize("element", SHORT_FLOATS)
@pytest.mark.parametrize("piece", [1 << 19, 7])  # below eight, the loop without vectors
def test_floats_are_rounded_to_the_nearest_and_ties_to_even(element, piece):
    chance = np.random.default_rng(3)
    anything = chance.integers(0, 2**32, 1 << 19, dtype=np.uint32).view(np.float32)[
        : 1 << 19 if piece > 7 else 70_000
    ]
    with np.errstate(invalid="ignore", over="ignore"):
        neighbours = as_torch(HALVES, element).float().numpy()
        between = (neighbours[:-1] + neighbours[1:]) / 2
    wide = np.concatenate([anything, neighbours, between]).astype(np.float32)
    narrow = np.empty(len(wide), np.uint16)
    for first in range(0, len(wide), piece):
        part = slice(first, first + piece)
        kernel.narrow(ELEMENTS.index(element), narrow[part], wide[part])
    expected = torch.from_numpy(wide).to(getattr(torch, element))
    torch.testing.assert_close(as_torch(narrow, element), expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~torch.isnan(expected)
    assert torch.equal(
        as_torch(narrow, element).view(torch.int16)[numbers], expected.view(torch.int16)[numbers]
    )


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("element", [*FLOATS, *WHOLE])
def test_combine(element, op):
    if element == "bfloat16":
        pytest.skip("NumPy has none; the group's tests compare it with torch")
    chance = np.random.default_rng(5)
    for count in COUNTS:
        pair = (
            chance.standard_normal((2, count)) * 100
            if element in FLOATS
            else chance.integers(0, 127, (2, count))
        )
        one, two = pair.astype(element)
        function = {"sum": np.add, "max": np.maximum, "min": np.minimum}[op]
        wide = "float32" if element == "float16" else element
        expected = function(one.astype(wide), two.astype(wide))
        found = one.copy()
        kernel.combine(ELEMENTS.index(element), REDUCTIONS.index(op), found, two)
        np.testing.assert_array_equal(found, expected.astype(element))


@pytest.mark.parametrize("element", ["int8", "int64", "uint16"])
def test_integers_wrap(element):
    highest = np.full(100, np.iinfo(element).max, element)
    found = highest.copy()
    kernel.combine(ELEMENTS.index(element), 0, found, highest)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, highest + highest)


@pytest.mark.parametrize("element", FLOATS)
def test_scale(element):
    tensor = torch.arange(5000).to(getattr(torch, element))
    octets = tensor.view(torch.uint8).numpy()
    expected = (tensor.float() if tensor.itemsize == 2 else tensor).mul(1 / 3).to(tensor.dtype)
    kernel.scale(ELEMENTS.index(element), octets, 1 / 3)
    assert torch.equal(tensor, expected)


def test_unaligned_rows():
    """Rows that begin anywhere: vectors need no alignment."""
    memory = np.zeros(4 * 2000 + 3, np.uint8)
    for shift in range(4):
        one = memory[shift : shift + 8000].view(np.float32)
        one[:] = 1
        kernel.combine(0, 0, one, np.full(2000, 2, np.float32))
        assert (one == 3).all()


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (
            lambda: kernel.combine(0, 0, np.empty(3, np.float32), np.empty(4, np.float32)),
            "one element type",
        ),
        (
            lambda: kernel.combine(99, 0, np.empty(3, np.float32), np.empty(3, np.float32)),
            "one element type",
        ),
        (
            lambda: kernel.combine(0, 0, np.empty(3, np.uint8), np.empty(3, np.uint8)),
            "one element type",
        ),
        (lambda: kernel.scale(ELEMENTS.index("int8"), np.empty(3, np.int8), 2.0), "only floats"),
        (
            lambda: kernel.widen(2, np.empty(3, np.float32), np.empty(4, np.float16)),
            "as many float32",
        ),
        (
            lambda: kernel.narrow(0, np.empty(3, np.float16), np.empty(3, np.float32)),
            "as many float32",
        ),
        (
            lambda: kernel.Team(np.zeros(100, np.uint8), 0, 2, 4096, 1, (1, 2), ValueError),
            "must fit each other",
        ),
        (
            lambda: kernel.Team(np.zeros(99999, np.uint8), 2, 2, 4096, 1, (1, 2), ValueError),
            "must fit each other",
        ),
        (
            lambda: team().operation(
                0, np.zeros(3, "f"), np.zeros(4, "f"), 4, 0, 0, 1.0, 0, False, None, None
            ),
            "is to hold 4",
        ),
        (
            lambda: team().operation(9, None, None, 0, 0, 0, 1.0, 0, False, None, None),
            "out of range",
        ),
        (
            lambda: team().operation(
                0, None, None, 4, 0, 0, 1.0, 0, False, (np.zeros(3, "f"),), None
            ),
            "holds all elements",
        ),
        (
            lambda: team().operation(0, None, None, 4, 0, 0, 1.0, 0, False, (), None),
            "one writable buffer a rank",
        ),
        (
            lambda: team().operation(
                0, *[np.zeros(9999, "f")] * 2, 9999, 0, 0, 1.0, 0, True, None, None
            ),
            "one half stage",
        ),
    ],
)
def test_mistakes_are_refused(call, rule):
    with pytest.raises(ValueError, match=rule):
        call()


def team():
    return kernel.Team(
        np.zeros(kernel.team_bytes(1, 4096), np.uint8), 0, 1, 4096, 1, (0,), ValueError
    )


def test_memory_lives_as_long_as_an_operation():
    operation = team().operation(
        0, np.ones(1000, "f"), target := np.zeros(1000, "f"), 1000, 0, 0, 1.0, 0, False, None, None
    )
    for _ in range(3):
        operation.run()
    assert (target == 1).all()
    with pytest.raises((ValueError, BufferError), match=r"resize|cannot"):
        target.resize(5)


@pytest.mark.parametrize("element", SHORT_FLOATS)
def test_pairs_of_short_floats(element):
    """Two rows are summed in one go: every value with its neighbours and with others, at odd places and lengths."""
    for shift, length in ((1, 65536), (77, 65535), (4099, 65533), (32768, 7)):
        one, two = HALVES[:length].copy(), np.roll(HALVES, shift)[:length].copy()
        expected = (as_torch(one, element).float() + as_torch(two, element).float()).to(
            getattr(torch, element)
        )
        kernel.combine(ELEMENTS.index(element), 0, one, two)
        torch.testing.assert_close(as_torch(one, element), expected, rtol=0, atol=0, equal_nan=True)
    memory = np.zeros(1001, np.uint16)
    kernel.combine(ELEMENTS.index(element), 0, memory[1:], HALVES[5:1005])
    assert np.array_equal(memory[1:], HALVES[5:1005])
