"""Pages are kept: what is freed and allocated again faults nothing in."""

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from mpillm.system.malloc import keep_pages

if "keep" in sys.argv:
    assert keep_pages()

def use():
    for array in [np.empty(3 << 20, np.uint8) for _ in range(20)]:
        array.fill(1)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    use()
before = faults()
for _ in range(3):
    use()
print(faults() - before)
"""


@pytest.mark.usefixtures("processes")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_what_is_freed_is_not_faulted_in_again():
    """Three times 60 MiB are 46,080 pages."""
    faults = {
        way: int(
            subprocess.run(
                [sys.executable, "-c", SCRIPT, way], check=True, capture_output=True, text=True
            ).stdout
        )
        for way in ("keep", "as it is")
    }
    assert faults["keep"] < 1000 < faults["as it is"]


RELEASE = """
import re
import numpy as np
from mpillm.system.malloc import keep_pages, release_pages

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

assert keep_pages()
arrays = [np.ones(4 << 20, np.uint8) for _ in range(16)]
last = np.ones(1 << 20, np.uint8)
del arrays
before = resident()
assert release_pages()
print(before - resident())
"""


@pytest.mark.usefixtures("processes")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_kept_pages_can_be_released():
    done = subprocess.run(
        [sys.executable, "-c", RELEASE], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) > 60 << 20
