"""Which process is it, and does it still run? Known on its own host only."""

import uuid
from pathlib import Path


def birth_of(pid: int) -> str:
    """Return the start time of a process, "" where it does not run.

    Process numbers are used again, so a number alone identifies no process.
    """
    return state_and_birth(pid)[1]


def state_and_birth(pid: int) -> tuple[str, str]:
    """Return the state of a process (such as T: stopped) and its start time, "" where it does not
    run: proc(5), fields 3 and 22. A zombie does not run.
    """
    try:
        fields = (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="ascii", errors="replace")
            .rpartition(")")[2]
            .split()
        )
        return ("", "") if fields[0] in ("Z", "X") else (fields[0], fields[19])
    except (OSError, IndexError):
        return "", ""


def process_space() -> str:
    """Name the boot and the process namespace in which this process's number means something."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    try:
        return f"{boot.read_text(encoding='ascii').strip()}:{space.stat().st_ino}"
    except OSError:
        return f"unknown:{uuid.uuid4().hex}"
