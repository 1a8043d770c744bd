"""Folders: the file system, free space, speed and locks of each, tried with a small file."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mpillm.doctor.check_base import Check, HostView, JobView
from mpillm.doctor.findings import Finding, guarded
from mpillm.doctor.subprocesses import run_child, trial
from mpillm.machine.mounts import mount_of, read_mounts
from mpillm.system.console import binary_bytes

AREA = "folders"
MIB = 1 << 20
# Large enough for a rate, small enough for a quota that is nearly used up; a file server that needs
# longer than this hangs.
TRIAL_BYTES, TRIAL_SECONDS = 8 * MIB, 30.0
# The checkpoint of even a small model takes more.
LITTLE_ROOM_BYTES = 1 << 30
SLOW_BYTES_PER_SECOND = 10e6
LOCKING_VARIABLE = "HDF5_USE_FILE_LOCKING"
IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class TriedFolder:
    """The trial of one folder on one host."""

    path: str
    kind: str = ""
    total: int = 0
    free: int = 0
    files_free: int | None = None
    failure: tuple[int, str] | None = None
    """A number of errno, and the step that met it."""
    hung: float = 0
    """Seconds after which the trial was given up; 0 where it ended."""
    write_seconds: float = 0
    read_seconds: float = 0
    locks: Mapping[str, str] = field(default_factory=dict)
    stripes: int | None = None


class FoldersCheck(Check):
    name, area = "folders", AREA

    def examine_host(self, host: HostView) -> Iterable[Finding]:
        environment = host.job.environment
        for path in folders_to_try(host.job):
            judge = partial(_try_and_judge, path, host.quiet, environment)
            yield from guarded(AREA, str(path), judge)


def folders_to_try(job: JobView) -> tuple[Path, ...]:
    """Return the user's folders, else the current one and the one for temporary files."""
    environment = job.environment
    here, temporary = Path(environment.get("PWD") or "/"), Path(environment.get("TMPDIR") or "/tmp")
    with suppress(FileNotFoundError):  # the current folder may have been removed
        here = Path.cwd()
    return tuple(dict.fromkeys(job.options.paths or (here, temporary)))


def _try_and_judge(
    path: Path, quiet: Mapping[str, str], environment: Mapping[str, str]
) -> list[Finding]:
    return judge_folder(read_folder(path, quiet), environment)


def read_folder(path: Path, environment: Mapping[str, str]) -> TriedFolder:
    """Try `path` in a child: a file server that hangs must not take this process with it."""
    ended = trial("folder_child", [str(path), str(TRIAL_BYTES)], environment, TRIAL_SECONDS)
    kind = _kind(os.path.abspath(path))  # noqa: PTH100 # resolving links would touch the folder
    if ended.code is None:
        return TriedFolder(str(path), kind, hung=TRIAL_SECONDS)
    if ended.code != 0:
        raise OSError(f"the trial of {path} {ended.how}")
    found: dict[str, Any] = json.loads(ended.out)
    failure = tuple(found["failure"]) if found["failure"] else None
    if failure and failure[1] == "open":
        return TriedFolder(str(path), kind, failure=failure)
    kind = _kind(str(path.resolve()))
    room = os.statvfs(path)
    return TriedFolder(
        str(path),
        kind,
        room.f_blocks * room.f_frsize,
        room.f_bavail * room.f_frsize,
        room.f_favail if room.f_files else None,
        failure,
        0,
        found.get("write_seconds", 0),
        found.get("read_seconds", 0),
        found.get("locks", {}),
        stripes(path, environment) if kind == "lustre" else None,
    )


def _kind(path: str) -> str:
    mount = mount_of(path, read_mounts())
    return mount.kind if mount else "unknown"


def stripes(path: Path, environment: Mapping[str, str]) -> int | None:
    """Return over how many servers Lustre spreads a new file of `path`; -1: over all.

    Returns None where there is no answer of `lfs`.
    """
    lfs = shutil.which("lfs", path=environment.get("PATH", ""))
    if lfs is None:
        return None
    ended = run_child(
        [lfs, "getstripe", "--stripe-count", "-d", str(path)], environment, TRIAL_SECONDS
    )
    found = re.search(r"-?\d+", ended.out) if ended.code == 0 else None
    return int(found[0]) if found else None


def judge_folder(folder: TriedFolder, environment: Mapping[str, str]) -> list[Finding]:
    """Judge one folder on one host; a fault is the only finding."""
    if folder.hung:
        found = f"no answer from its file system ({folder.kind}) within {folder.hung:.0f} s"
        remedy = (
            "its server is down or out of reach: report it to the site's staff, "
            "or choose another folder"
        )
        return [Finding(AREA, folder.path, "error", found, remedy)]
    if folder.failure:
        return [judge_failure(folder, *folder.failure)]
    findings = [judge_room(folder), judge_rate(folder), judge_locks(folder, environment)]
    return findings + ([judge_stripes(folder)] if folder.stripes is not None else [])


FAILURES = {
    errno.ENOENT: ("there is no such folder", "make it: mkdir -p {path}"),
    errno.ENOTDIR: ("it is not a folder", "name a folder"),
    errno.EROFS: (
        "read-only, nothing can be written",
        "choose a folder on a file system that is mounted for writing "
        "(scratch or work; on some sites compute nodes see home read-only), or mount -o remount,rw",
    ),
    errno.EACCES: (
        "you may not write there",
        "choose a folder of your own, or ask its owner: ls -ld {path}",
    ),
    errno.EPERM: (
        "you may not write there",
        "choose a folder of your own, or ask its owner: ls -ld {path}",
    ),
    errno.EDQUOT: (
        "your quota is used up",
        "delete what is no longer needed, or ask for more (quota -s; lfs quota)",
    ),
}


def judge_failure(folder: TriedFolder, number: int, step: str) -> Finding:
    path, kind = folder.path, f" ({folder.kind})" if folder.kind else ""
    if number == errno.ENOSPC:
        text, remedy = full(folder)
    elif number in FAILURES:
        text, remedy = FAILURES[number]
    else:
        text = f"cannot {step} a file: {os.strerror(number)}"
        remedy = "choose another folder, or show this to the site's staff"
    return Finding(AREA, path, "error", f"{text}{kind}", remedy.format(path=path))


def full(folder: TriedFolder) -> tuple[str, str]:
    """Describe a full disk: of bytes, or of names."""
    if folder.files_free == 0:
        return (
            "full: no file more can be made, its inodes are used up",
            "delete small files, or choose another folder",
        )
    room = f"{binary_bytes(folder.free)} free of {binary_bytes(folder.total)}"
    return f"full: {room}, and {binary_bytes(TRIAL_BYTES)} were to be written", (
        "delete what is no longer needed there (du -xsh {path}/*), or choose another folder"
    )


def judge_room(folder: TriedFolder) -> Finding:
    found = f"{folder.kind}, {binary_bytes(folder.free)} free of {binary_bytes(folder.total)}"
    if folder.kind in IN_MEMORY:
        found += ", which is in memory"
    if folder.free < LITTLE_ROOM_BYTES:
        remedy = (
            f"a checkpoint may not fit: delete what is no longer needed (du -xsh {folder.path}/*)"
        )
        return Finding(AREA, folder.path, "warning", found, remedy)
    return Finding(AREA, folder.path, "ok", found)


def judge_rate(folder: TriedFolder) -> Finding:
    write, read = (
        TRIAL_BYTES / max(seconds, 1e-6) for seconds in (folder.write_seconds, folder.read_seconds)
    )
    found = (
        f"writes {_rate(write)}, reads {_rate(read)}, by one file of {binary_bytes(TRIAL_BYTES)}"
    )
    name = f"{folder.path}: speed"
    if write < SLOW_BYTES_PER_SECOND:
        remedy = (
            "keep runs on the parallel file system or a local disk; "
            "`mpillm bench filesystem --folder` measures more"
        )
        return Finding(AREA, name, "warning", found, remedy)
    return Finding(AREA, name, "ok", found)


def _rate(bytes_per_second: float) -> str:
    return f"{float(f'{bytes_per_second / 1e6:.2g}'):,.0f} MB/s"


def judge_locks(folder: TriedFolder, environment: Mapping[str, str]) -> Finding:
    name = f"{folder.path}: locks"
    bad = {lock: result for lock, result in folder.locks.items() if result != "kept"}
    if not bad:
        return Finding(AREA, name, "ok", "kept between processes")
    text = ", ".join(f"{lock} {_outcome(result)}" for lock, result in bad.items())
    if environment.get(LOCKING_VARIABLE, "").upper() in ("FALSE", "0"):
        setting = f"{LOCKING_VARIABLE}={environment[LOCKING_VARIABLE]} is set"
        return Finding(AREA, name, "ok", f"{text}; {setting}")
    remedy = (
        f"export {LOCKING_VARIABLE}=FALSE for h5py, h5dump and other HDF5 programs (mpillm itself "
        "locks no HDF5 file), or mount it with locks (NFS: rpc.statd and lockd; Lustre: -o flock)"
    )
    refused = all(result != "granted twice" for result in bad.values())
    found = f"locking {'refused' if refused else 'not kept'}: {text}"
    return Finding(AREA, name, "warning", found, remedy)


def _outcome(result: str) -> str:
    number = getattr(errno, result, None)
    return result if number is None else f"fails with {result} ({os.strerror(number)})"


def judge_stripes(folder: TriedFolder) -> Finding:
    name, count = f"{folder.path}: stripes", folder.stripes
    if count == 1:
        found = "a new file is on one Lustre server alone"
        remedy = f"for large checkpoints spread it over several: lfs setstripe -c 4 {folder.path}"
        return Finding(AREA, name, "warning", found, remedy)
    found = f"a new file is spread over {'all' if count == -1 else count} Lustre servers"
    return Finding(AREA, name, "ok", found)
