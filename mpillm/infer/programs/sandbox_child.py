"""Run a program from the standard input, without the files, network and processes of others.

A script: `python -I -S sandbox_child.py PLACE SECONDS BYTES`. PLACE has two empty folders: `root`,
for the program's file system, and `work`, into which it may write. The first line of the input is
a secret word, the rest the program. READY goes to the standard output ahead of the program, and the
word once it has run to its end, so that a program which leaves early has not passed. What fails
ahead of the program is on the standard error, which the program does not have. Linux alone:
namespaces of users, mounts, network and processes (Linux 5.12).
"""

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

# linux/sched.h: namespaces of users, mounts, the network, IPC and processes.
NAMESPACES = 0x10000000 | 0x00020000 | 0x40000000 | 0x08000000 | 0x20000000
# linux/prctl.h.
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
# sys/mount.h.
MS_NOSUID, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4096, 16384, 1 << 18, 2
# linux/mount.h and linux/fcntl.h; the system call's number is the same on all architectures.
MOUNT_SETATTR, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 442, 1, 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
# linux/capability.h.
CAPABILITY_VERSION_3 = 0x20080522
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
SYSTEM = ("/usr", "/lib", "/lib64", "/bin")
ROOT_BYTES = 1 << 20
READY = b"+"
MOST_FILE_BYTES, MOST_FILES, MOST_PROCESSES = 16 << 20, 64, 32


class MountAttributes(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")
    )


def fault(what: str) -> OSError:
    """Name what the kernel does not give, with its reason."""
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def enter_namespaces(libc: ctypes.CDLL) -> None:
    """Leave the mounts, network and processes of the host; the next child is the first of its own.

    The user is the same within: files that the program makes belong to the user.
    """
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(NAMESPACES):
        raise fault("namespaces of users, mounts, network and processes")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        Path("/proc/self", name).write_text(text)


def change_root(libc: ctypes.CDLL, place: str) -> None:
    """Let this process see Python and the system's libraries, read-only, and `work`, alone.

    A read-only mount refuses changes of modes, owners and times, too; what is not mounted has no
    path, such as the sockets of the host's daemons.
    """
    root, work = f"{place}/root", f"{place}/work"
    mount(libc, None, "/", None, MS_REC | MS_PRIVATE)
    mount(libc, "tmpfs", root, "tmpfs", MS_NOSUID, f"size={ROOT_BYTES},mode=755")
    for path in dict.fromkeys((*SYSTEM, *DEVICES, sys.base_prefix, sys.prefix)):
        # As on many hosts /lib is a link into /usr.
        if Path(path).is_symlink():
            Path(root + path).symlink_to(Path(path).readlink())
        elif Path(path).exists() and not Path(root + path).exists():
            bind(libc, path, root)
            read_only(libc, root + path)
    bind(libc, work, root)
    os.chdir(root)
    if libc.pivot_root(b".", b".") or libc.umount2(b".", MNT_DETACH):
        raise fault("a root of its own")
    read_only(libc, "/", recursive=False)
    os.chdir(work)


def bind(libc: ctypes.CDLL, path: str, root: str) -> None:
    """Mount a folder or a file at the same path below `root`."""
    target = Path(root + path)
    if Path(path).is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount(libc, path, str(target), None, MS_BIND | MS_REC)


def mount(
    libc: ctypes.CDLL, source: str | None, target: str, kind: str | None, flags: int, data: str = ""
) -> None:
    names = [None if text is None else text.encode() for text in (source, target, kind)]
    if libc.mount(*names, ctypes.c_ulong(flags), data.encode()):
        raise fault(f"a mount at {target}")


def read_only(libc: ctypes.CDLL, path: str, recursive: bool = True) -> None:
    """Make a mount read-only, with those below it."""
    wanted = MountAttributes(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    given = AT_FDCWD, path.encode(), flags, ctypes.byref(wanted), size
    if libc.syscall(MOUNT_SETATTR, *given):
        raise fault(f"a read-only mount at {path}")


def drop_rights(libc: ctypes.CDLL) -> None:
    """Give up the rights over mounts: in namespaces of its own the program cannot undo them."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.capset(header, (ctypes.c_uint32 * 6)()):
        raise fault("a process without rights")


def limit_resources(seconds: int, memory_bytes: int) -> None:
    """Bound the time, the memory, the files and the processes of what runs from here on."""
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, MOST_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MOST_FILES),
        (resource.RLIMIT_NPROC, MOST_PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        # A site's own limit may be lower.
        hard = resource.getrlimit(kind)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))


def run(program: str, word: str) -> None:
    """Run the program, which has no output, then write the word."""
    report = os.dup(1)
    nothing = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.write(report, READY)
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    os.write(report, word.encode())


def main() -> None:
    place, seconds, memory_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    word, _, program = sys.stdin.read().partition("\n")
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        enter_namespaces(libc)
        change_root(libc, place)
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return
        # With the first process of a namespace all of its processes end.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        drop_rights(libc)
        limit_resources(seconds, memory_bytes)
    except OSError as failure:
        sys.stderr.write(str(failure.strerror))
        sys.stderr.flush()
        os._exit(1)
    try:
        run(program, word)
    finally:
        # No handler of the program runs, and no traceback is written.
        os._exit(0)


if __name__ == "__main__":
    main()
