"""Run a program from the standard input, without the files, network and processes of others.

A script: `python -I -S sandbox_child.py FOLDER SECONDS BYTES`. The first line of its input is a
secret word, the rest the program. The word is written to the standard output once the program has
run to its end, so that a program which leaves early has not passed. What fails ahead of the program
is on the standard error, which the program does not have. Linux alone: namespaces of
users, network and processes, and Landlock (Linux 5.13).
"""

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

# linux/sched.h: namespaces of users, of the network, of IPC and of processes.
NAMESPACES = 0x10000000 | 0x40000000 | 0x08000000 | 0x20000000
# linux/prctl.h.
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
# The numbers of Landlock's system calls are the same on all architectures.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
RULE_OF_PATH, ASK_VERSION = 1, 1
# linux/landlock.h: the rights that each version of Landlock knows, and those of a reader.
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
EXECUTE, WRITE_FILE, READ_FILE, READ_FOLDER = 1, 2, 4, 8
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
SYSTEM = ("/usr", "/lib", "/lib64")
MOST_FILE_BYTES, MOST_FILES, MOST_PROCESSES = 16 << 20, 64, 32


class Ruleset(ctypes.Structure):
    _fields_ = (("handled", ctypes.c_uint64),)


class RuleOfPath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("descriptor", ctypes.c_int32))


def fault(what: str) -> OSError:
    """Name what the kernel does not give, with its reason."""
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def enter_namespaces(libc: ctypes.CDLL) -> None:
    """Leave the network and the processes of the host; the next child is the first of its own."""
    if libc.unshare(NAMESPACES):
        raise fault("namespaces of users, network and processes")


def restrict_files(libc: ctypes.CDLL, folder: str) -> None:
    """Let this process read Python and the system's libraries, and write into `folder`, alone."""
    version = libc.syscall(CREATE_RULESET, None, 0, ASK_VERSION)
    if version < 1:
        raise fault("Landlock")
    rights = RIGHTS[max(known for known in RIGHTS if known <= version)]
    ruleset = Ruleset(rights)
    size = ctypes.c_size_t(ctypes.sizeof(ruleset))
    rules = libc.syscall(CREATE_RULESET, ctypes.byref(ruleset), size, 0)
    if rules < 0:
        raise fault("Landlock")
    read = EXECUTE | READ_FILE | READ_FOLDER
    allowed = dict.fromkeys((*SYSTEM, sys.base_prefix, sys.prefix), read)
    allowed |= dict.fromkeys(DEVICES, READ_FILE | WRITE_FILE) | {folder: rights}
    for path, right in allowed.items():
        if not Path(path).exists():
            continue
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = RuleOfPath(right, descriptor)
        if libc.syscall(ADD_RULE, rules, RULE_OF_PATH, ctypes.byref(rule), 0):
            raise fault(f"Landlock, for {path}")
        os.close(descriptor)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(RESTRICT_SELF, rules, 0):
        raise fault("Landlock")
    os.close(rules)


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
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    os.write(report, word.encode())


def main() -> None:
    folder, seconds, memory_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    word, _, program = sys.stdin.read().partition("\n")
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        enter_namespaces(libc)
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return
        # With the first process of a namespace all of its processes end.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        restrict_files(libc, folder)
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
