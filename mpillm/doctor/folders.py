"""A folder: which file system it lies on, its room, whether it can be written and locked, how fast, and for whom."""

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpillm.doctor.findings import Finding
from mpillm.doctor.subprocesses import run, trial
from mpillm.machine.mounts import mount_of, read_mounts
from mpillm.system.console import binary_bytes

AREA = "folders"
MIB = 1 << 20
TRIAL_BYTES, TRIAL_SECONDS = 8 * MIB, 30.0
# A checkpoint of even a small model takes more.
LITTLE_ROOM_BYTES = 1 << 30
SLOW_BYTES_PER_SECOND = 10e6
LOCKING_VARIABLE = "HDF5_USE_FILE_LOCKING"
IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Folder:
    """What was found of one folder on one host. `failure`: a number of errno and the step that met it; `hung`: after
    how many seconds its trial was given up, 0 where it ended.
    """

    path: str
    kind: str = ""
    total: int = 0
    free: int = 0
    files_free: int | None = None
    failure: tuple[int, str] | None = None
    hung: float = 0
    write_seconds: float = 0
    read_seconds: float = 0
    locks: Mapping[str, str] = field(default_factory=dict)
    stripes: int | None = None


def read_folder(path: Path, environment: Mapping[str, str]) -> Folder:
    """Try `path` in a child; this process itself touches it only when the child has come back."""
    ended = trial("folder_child", [str(path), str(TRIAL_BYTES)], environment, TRIAL_SECONDS)
    kind = _kind(os.path.abspath(path))  # noqa: PTH100 # resolving links would touch the folder
    if ended.code is None:
        return Folder(str(path), kind, hung=TRIAL_SECONDS)
    if ended.code != 0:
        raise OSError(f"the trial of {path} {ended.how}")
    told: dict[str, Any] = json.loads(ended.out)
    failure = tuple(told["failure"]) if told["failure"] else None
    if failure and failure[1] == "open":
        return Folder(str(path), kind, failure=failure)
    kind = _kind(str(path.resolve()))
    room = os.statvfs(path)
    return Folder(
        str(path),
        kind,
        room.f_blocks * room.f_frsize,
        room.f_bavail * room.f_frsize,
        room.f_favail if room.f_files else None,
        failure,
        0,
        told.get("write_seconds", 0),
        told.get("read_seconds", 0),
        told.get("locks", {}),
        stripes(path, environment) if kind == "lustre" else None,
    )


def _kind(path: str) -> str:
    mount = mount_of(path, read_mounts())
    return mount.kind if mount else "unknown"


def stripes(path: Path, environment: Mapping[str, str]) -> int | None:
    """Over how many servers Lustre spreads a new file of `path`; None where `lfs` cannot tell; -1: over all."""
    lfs = shutil.which("lfs", path=environment.get("PATH", ""))
    if lfs is None:
        return None
    ended = run([lfs, "getstripe", "--stripe-count", "-d", str(path)], environment, TRIAL_SECONDS)
    found = re.search(r"-?\d+", ended.out) if ended.code == 0 else None
    return int(found[0]) if found else None


def judge_folder(folder: Folder, environment: Mapping[str, str]) -> list[Finding]:
    """All about one folder on one host, the fault first."""
    if folder.hung:
        found = f"no answer from its file system ({folder.kind}) within {folder.hung:.0f} s"
        remedy = (
            "its server is down or out of reach: tell the site's staff, or choose another folder"
        )
        return [Finding(AREA, folder.path, "error", found, remedy)]
    if folder.failure:
        return [judge_failure(folder, *folder.failure)]
    findings = [judge_room(folder), judge_rate(folder), judge_locks(folder, environment)]
    return findings + ([judge_stripes(folder)] if folder.stripes is not None else [])


FAILURES = {
    errno.ENOENT: ("there is no such folder", "make it: mkdir -p {path}"),
    errno.ENOTDIR: ("it is no folder", "name a folder"),
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


def judge_failure(folder: Folder, number: int, step: str) -> Finding:
    path, kind = folder.path, f" ({folder.kind})" if folder.kind else ""
    if number == errno.ENOSPC:
        text, remedy = full(folder)
    elif number in FAILURES:
        text, remedy = FAILURES[number]
    else:
        text = f"cannot {step} a file: {os.strerror(number)}"
        remedy = "choose another folder, or show this to the site's staff"
    return Finding(AREA, path, "error", f"{text}{kind}", remedy.format(path=path))


def full(folder: Folder) -> tuple[str, str]:
    """A disk may be full of bytes or of names."""
    if folder.files_free == 0:
        return (
            "full: no file more can be made, its inodes are used up",
            "delete small files, or choose another folder",
        )
    room = f"{binary_bytes(folder.free)} free of {binary_bytes(folder.total)}"
    return f"full: {room}, and {binary_bytes(TRIAL_BYTES)} were to be written", (
        "delete what is no longer needed there (du -xsh {path}/*), or choose another folder"
    )


def judge_room(folder: Folder) -> Finding:
    found = f"{folder.kind}, {binary_bytes(folder.free)} free of {binary_bytes(folder.total)}"
    if folder.kind in IN_MEMORY:
        found += ", which lies in memory"
    if folder.free < LITTLE_ROOM_BYTES:
        remedy = (
            f"a checkpoint may not fit: delete what is no longer needed (du -xsh {folder.path}/*)"
        )
        return Finding(AREA, folder.path, "warning", found, remedy)
    return Finding(AREA, folder.path, "ok", found)


def judge_rate(folder: Folder) -> Finding:
    write, read = (
        TRIAL_BYTES / max(seconds, 1e-6) for seconds in (folder.write_seconds, folder.read_seconds)
    )
    found = (
        f"writes {_rate(write)}, reads {_rate(read)}, by one file of {binary_bytes(TRIAL_BYTES)}"
    )
    name = f"{folder.path}: speed"
    if write < SLOW_BYTES_PER_SECOND:
        remedy = "keep runs on the parallel file system or a local disk; `mpillm bench filesystem --folder` tells more"
        return Finding(AREA, name, "warning", found, remedy)
    return Finding(AREA, name, "ok", found)


def _rate(bytes_per_second: float) -> str:
    return f"{float(f'{bytes_per_second / 1e6:.2g}'):,.0f} MB/s"


def judge_locks(folder: Folder, environment: Mapping[str, str]) -> Finding:
    name = f"{folder.path}: locks"
    bad = {lock: told for lock, told in folder.locks.items() if told != "kept"}
    if not bad:
        return Finding(AREA, name, "ok", "kept between processes")
    told = ", ".join(f"{lock} {_told(result)}" for lock, result in bad.items())
    if environment.get(LOCKING_VARIABLE, "").upper() in ("FALSE", "0"):
        return Finding(
            AREA, name, "ok", f"{told}; {LOCKING_VARIABLE}={environment[LOCKING_VARIABLE]} is set"
        )
    remedy = (
        f"export {LOCKING_VARIABLE}=FALSE for h5py, h5dump and other HDF5 programs (mpillm itself locks no HDF5 file), "
        "or mount it with locks (NFS: rpc.statd and lockd; Lustre: -o flock)"
    )
    refused = all(result != "granted twice" for result in bad.values())
    return Finding(
        AREA, name, "warning", f"locking {'refused' if refused else 'not kept'}: {told}", remedy
    )


def _told(result: str) -> str:
    number = getattr(errno, result, None)
    return result if number is None else f"fails with {result} ({os.strerror(number)})"


def judge_stripes(folder: Folder) -> Finding:
    name, count = f"{folder.path}: stripes", folder.stripes
    if count == 1:
        found = "a new file lies on one Lustre server alone"
        remedy = f"for large checkpoints spread it over several: lfs setstripe -c 4 {folder.path}"
        return Finding(AREA, name, "warning", found, remedy)
    return Finding(
        AREA,
        name,
        "ok",
        f"a new file is spread over {'all' if count == -1 else count} Lustre servers",
    )
