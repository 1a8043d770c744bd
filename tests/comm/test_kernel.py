"""The compiled kernel against NumPy and torch, and its loader in a checkout.

Each element type, each reduction, and every 16-bit float.
"""

import shutil
import sys
from pathlib import Path

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
        pytest.skip("NumPy has no bfloat16; the communicator's tests compare it with torch")
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
            "one half of a staging buffer",
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
    """Two rows are summed in one pass: every value, with neighbours and others, at odd offsets."""
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


# ---- the loader ----

LOAD = "import mpillm.comm.kernel as kernel; print(kernel._kernel.__file__, kernel.combine)"


@pytest.fixture
def checkout(folder):
    """Copy this checkout's comm, without a compiled module of its own."""
    package = Path(kernel.__file__).parents[1]
    copy = folder / "checkout" / "mpillm"
    shutil.copytree(
        package / "comm", copy / "comm", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copy(package / "__init__.py", copy)
    # A script, because `python -c` would import from the current folder first.
    (copy.parent / "load.py").write_text(LOAD)
    return copy.parent


def test_a_checkout_runs_with_the_installed_module(checkout, python):
    """An edit of a Python file takes effect; the compiled module is the installed package's."""
    edited = checkout / "mpillm/comm/kernel.py"
    edited.write_text(edited.read_text() + "print('edited')\n")
    done = python(checkout / "load.py", PYTHONPATH=str(checkout))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "edited"
    assert not second.startswith(str(checkout))
    assert "_kernel" in second


@pytest.mark.parametrize("change", ["changed", "removed"])
def test_other_c_sources_give_one_warning_with_the_command(checkout, python, change):
    sources = checkout / "mpillm/comm/csrc"
    if change == "changed":
        (sources / "team.c").write_text((sources / "team.c").read_text() + "\n/* changed */\n")
    else:  # as in an installed package, which has no sources
        shutil.rmtree(sources)
    done = python(checkout / "load.py", PYTHONPATH=str(checkout))
    assert done.returncode == 0, done.stderr
    if change == "changed":
        (line,) = done.stderr.splitlines()
        assert f"the C sources in {sources} differ" in line
        assert f"rebuild it with `{kernel.REBUILD}`" in line
    else:
        assert done.stderr == ""


def test_the_hash_is_that_of_names_in_order(tmp_path):
    (tmp_path / "b.c").write_text("int b;")
    (tmp_path / "a.h").write_text("int a;")
    (tmp_path / "notes.txt").write_text("not compiled")
    first = kernel.source_hash(tmp_path)
    (tmp_path / "notes.txt").unlink()
    assert kernel.source_hash(tmp_path) == first
    (tmp_path / "a.h").write_text("int c;")
    assert kernel.source_hash(tmp_path) != first
    (tmp_path / "a.h").unlink()
    (tmp_path / "b.c").unlink()
    assert kernel.source_hash(tmp_path) == ""


def test_the_module_next_to_the_loader_comes_first(tmp_path, monkeypatch):
    """The checkout's own module, then sys.path, then site-packages; each once."""
    name = Path(kernel._kernel.__file__).name
    places = [tmp_path / place for place in ("own", "path")]
    for place in places:
        (place / "mpillm/comm").mkdir(parents=True)
        (place / "mpillm/comm" / name).touch()
    monkeypatch.setattr(kernel, "__file__", str(places[0] / "mpillm/comm/kernel.py"))
    monkeypatch.setattr(sys, "path", [str(places[1]), str(places[0]), *sys.path])
    found = [path.parents[2] for path in kernel.compiled_files()]
    assert found[:2] == places
    assert len(found) == len(set(found))


def test_without_a_module_the_error_has_the_command(monkeypatch):
    monkeypatch.setattr(kernel, "compiled_files", lambda: iter(()))
    with pytest.raises(ImportError, match=r"not installed for this Python; build it with `pip"):
        kernel.load_kernel()


def test_a_module_without_a_name_is_refused_before_its_hash_is_read(monkeypatch, tmp_path):
    stale = tmp_path / "stale.py"
    stale.write_text("".join(f"{name} = 0\n" for name in kernel.NAMES if name != "SOURCE_HASH"))
    monkeypatch.setattr(kernel, "compiled_files", lambda: iter((stale,)))
    with pytest.raises(ImportError, match="has no SOURCE_HASH: it was built from another version"):
        kernel.load_kernel()
