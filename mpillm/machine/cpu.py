"""The processor of this node, as Linux names it."""

import platform
from pathlib import Path

from mpillm.machine.topology import text_of

# x86 writes "model name", POWER "cpu", some ARM kernels "Model".
NAME_KEYS = ("model name", "cpu", "Model")


def processor(table: Path = Path("/proc/cpuinfo")) -> tuple[str, int]:
    """Return the processor's name and the number of logical cores of this node."""
    pairs = [
        (key.strip(), value.strip())
        for key, _, value in (line.partition(":") for line in text_of(table).splitlines())
    ]
    names = [value for key, value in pairs if key in NAME_KEYS]
    return (names or [platform.machine()])[0], sum(key == "processor" for key, _ in pairs) or 1
