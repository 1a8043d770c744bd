"""A Slurm cluster on one machine, for tests: a head and nodes with names, addresses and processes of their own.

    python tests/peers/minicluster.py up --state DIR [--nodes 2 --cpus 2 --hold]
    python tests/peers/minicluster.py exec --state DIR [--node n1] sbatch job.sh
    python tests/peers/minicluster.py kill-node --state DIR n2     as if its power had gone
    python tests/peers/minicluster.py start-node --state DIR n2
    python tests/peers/minicluster.py down --state DIR

Needs root, and of Debian's packages slurm-wlm, munge, libpmix-dev (whose link libpmix.so Slurm's mpi/pmix opens) and
iproute2; where something is missing, `up` ends with status 77. With `--hold` it stays until its input ends, and takes
the cluster down: whoever started it may die in any way. The nodes see the machine's files, but for TMPDIR and /dev/shm.

All of it lives in the head's namespaces, so nothing of the host changes; when the head's first process ends, the kernel
ends every process of the cluster. That one is all that `down` kills. Logs stay in DIR/log.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

UNAVAILABLE = 77
PATIENCE_SECONDS = 60
NETWORK = "10.77.0"
PMIX = "/usr/lib/*-linux-gnu/pmix2/lib/libpmix.so"
NEW_NODE = ("unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
NEW_HEAD = (*NEW_NODE, "--net")
TOOLS = ("unshare", "nsenter", "setpriv", "ip", "hostname", "munged", "slurmctld", "slurmd", "sbatch")

# Each host has a temporary folder of its own: Open MPI names its session's by process number, and those repeat. The
# machine's control groups are hidden, or slurmd would make some, and ask systemd where it runs.
HOST = """set -e
hostname "$2"
mount -t tmpfs -o mode=1777 tmpfs "$1/tmp"
mount -t tmpfs -o mode=1777,size=1g tmpfs /dev/shm
mount -t tmpfs tmpfs /sys/fs/cgroup
ip link set lo up
"""
# The first process of a process namespace inherits all orphans: it must wait for them.
STAY = "while :; do sleep 60 & wait $! || true; done\n"
HEAD = f"""{HOST}
mount -t tmpfs tmpfs /run
mkdir /run/netns
mount --bind "$1/hosts" /etc/hosts
ip link add bridge type bridge
ip address add {NETWORK}.254/24 dev bridge
ip link set bridge up
munged --foreground --force --key-file="$1/munge/key" --socket="$1/munge/socket" --log-file="$1/log/munged" \
    --pid-file="$1/munge/pid" --seed-file="$1/munge/seed" &
until [ -S "$1/munge/socket" ]; do sleep 0.05; done
slurmctld -D -c -i >"$1/log/slurmctld.out" 2>&1 &
touch "$1/head.ready"
{STAY}"""
# A node that comes back has its old address: what others remember of it holds. With a new one a job was not launched.
LINK = f"""set -e
ip netns add "$1"
ip link add "$1" type veth peer name eth0 address "$(printf 02:00:00:00:00:%02x "$2")" netns "$1"
ip link set "$1" master bridge up
ip -n "$1" address add {NETWORK}.$2/24 dev eth0
ip -n "$1" link set eth0 up
"""
NODE = f"""{HOST}
slurmd -D -N "$2" >>"$1/log/$2.out" 2>&1 &
{STAY}"""
SLURM_CONF = """\
ClusterName=mini
SlurmctldHost=head({network}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its credential to expire: 120 s by default.
AuthInfo=socket={state}/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
StateSaveLocation={state}/ctl
SlurmdSpoolDir={state}/spool/%n
TmpFS={state}/tmp
SlurmctldPidFile={state}/ctl/pid
SlurmdPidFile={state}/spool/%n.pid
SlurmctldLogFile={state}/log/slurmctld
SlurmdLogFile={state}/log/slurmd.%n
SlurmctldTimeout=10
SlurmdTimeout=10
ReturnToService=2
KillWait=5
MinJobAge=3600
NodeName={nodes} CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    if os.geteuid():
        return "root is needed for network namespaces"
    if absent := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"there is no {', '.join(absent)} on PATH; Debian's packages are slurm-wlm, munge, iproute2, util-linux"
    if not any(Path("/").glob(PMIX.lstrip("/"))):
        return "Slurm's mpi/pmix opens libpmix.so, which Debian's package libpmix-dev has"
    wanted = "mount -t tmpfs tmpfs /run && ip link add bridge type bridge && ip link add n1 type veth peer name n2"
    tried = subprocess.run([*NEW_HEAD, "sh", "-c", wanted], capture_output=True, text=True, check=False)
    told = tried.stderr.strip().splitlines() or ["unshare failed"]
    return f"the kernel gives no namespaces, bridges or links: {told[-1]}" if tried.returncode else ""


def born(pid: int) -> str:
    """When a process began, as the kernel counts; empty when there is none: numbers of processes are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def entering(pid: int, folder: Path | str) -> list[str]:
    """What runs a command where the first child of process `pid`, an unshare, is the first process."""
    spaces = ("--net", "--uts", "--ipc", "--mount", f"--pid=/proc/{pid}/ns/pid_for_children")
    return ["nsenter", f"--target={pid}", *spaces, f"--wd={folder}"]


def wait_until(done: Callable[[], bool], what: str) -> None:
    """Raises SystemExit where it does not come true in time."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not done():
        if time.monotonic() > end:
            raise SystemExit(f"minicluster.py: {what} did not come in {PATIENCE_SECONDS} s")
        time.sleep(0.05)


class Cluster:
    """A cluster as its folder tells it."""

    def __init__(self, state: Path) -> None:
        self.state = state.resolve()
        self._head = self.state / "head"

    def running(self) -> int:
        """The process that keeps the head's namespaces, 0 where the cluster is down."""
        if not self._head.exists():
            return 0
        pid, began = json.loads(self._head.read_text())
        return pid if born(pid) == began else 0

    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.state / "slurm.conf"), "TMPDIR": str(self.state / "tmp")}

    def command(self, node: str, argv: Sequence[str], folder: Path | str = "/") -> list[str]:
        """What runs `argv` on the head or on a node, begun on this machine. Raises SystemExit where it is not up."""
        pid = self.running()
        if not pid:
            raise SystemExit(f"minicluster.py: there is no cluster in {self.state}; `up --state DIR` makes one")
        if node == "head":
            return [*entering(pid, folder), *argv]
        pid_file = self.state / f"{node}.pid"
        if not pid_file.exists():
            raise SystemExit(f"minicluster.py: the cluster in {self.state} has no node {node} that is up")
        return [*entering(pid, folder), *entering(int(pid_file.read_text()), folder), *argv]

    def on_head(self, *argv: str) -> str:
        done = subprocess.run(
            self.command("head", argv), env=self.environment(), stdin=subprocess.DEVNULL, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"minicluster.py: {argv[0]} failed: {done.stderr.strip()}")
        return done.stdout

    def up(self, nodes: int, cpus: int, held: bool) -> None:
        """Make the cluster and wait until all nodes are idle."""
        self.down()
        names = [f"n{number}" for number in range(1, nodes + 1)]
        self._write_files(names, cpus)
        # Held, the head ends with this process, however that ends.
        dying = ["setpriv", "--pdeathsig", "KILL"] if held else []
        head = self._start([*dying, *NEW_HEAD, "sh", "-c", HEAD, "sh", str(self.state), "head"], "head")
        self._head.write_text(json.dumps([head, born(head)]))
        wait_until((self.state / "head.ready").exists, f"the head (see {self.state}/log)")
        for name in names:
            self.start_node(name)
        idle = ("sinfo", "--noheader", "--states=idle", "--format=%D")
        wait_until(lambda: self.on_head(*idle).strip() == str(nodes), f"{nodes} idle nodes (see {self.state}/log)")

    def _write_files(self, names: list[str], cpus: int) -> None:
        for folder in ("log", "ctl", "munge", "tmp"):
            (self.state / folder).mkdir(parents=True, exist_ok=True)
        (self.state / "munge/key").write_bytes(os.urandom(128))
        (self.state / "munge/key").chmod(0o400)
        addresses = [("127.0.0.1", "localhost"), (f"{NETWORK}.254", "head")]
        addresses += [(f"{NETWORK}.{name[1:]}", name) for name in names]
        (self.state / "hosts").write_text("".join(f"{address} {name}\n" for address, name in addresses))
        # Of the two the one that makes no groups unless it is asked to.
        (self.state / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.state / "slurm.conf").write_text(
            SLURM_CONF.format(network=NETWORK, state=self.state, nodes=f"n[1-{len(names)}]", cpus=cpus)
        )

    def _start(self, argv: list[str], name: str) -> int:
        with (self.state / f"log/{name}.out").open("a") as log:
            return subprocess.Popen(
                argv, env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            ).pid

    def start_node(self, name: str) -> None:
        # As a node without a disk begins. Sockets of a job's steps would keep the job from starting again.
        shutil.rmtree(self.state / "spool" / name, ignore_errors=True)
        (self.state / "spool" / name).mkdir(parents=True)
        self.on_head("sh", "-c", LINK, "sh", name, name[1:])
        pid_file = self.state / f"{name}.pid"
        pid_file.unlink(missing_ok=True)
        # Entering a process namespace forks: only the shell in it knows its number there.
        script = 'echo $$ >"$1.new"; mv "$1.new" "$1"; shift; exec nsenter --net="/run/netns/$@"'
        init = ["sh", "-c", NODE, "sh", str(self.state), name]
        node = ["sh", "-c", script, "sh", str(pid_file), name, *NEW_NODE, *init]
        self._start(self.command("head", node), name)
        wait_until(pid_file.exists, f"the node {name}")

    def kill_node(self, name: str) -> None:
        """End the node's processes at once and take its link away: the others hear nothing more of it."""
        pid_file = self.state / f"{name}.pid"
        self.on_head("ip", "link", "delete", name)
        self.on_head("kill", "-KILL", pid_file.read_text().strip())
        self.on_head("ip", "netns", "delete", name)
        pid_file.unlink()

    def down(self) -> None:
        pid = self.running()
        if pid:
            os.kill(pid, 9)
            wait_until(lambda: self._ended(pid), "the end of the head")
        for name in ("ctl", "spool", "tmp", "munge"):
            shutil.rmtree(self.state / name, ignore_errors=True)
        for path in (self._head, self.state / "head.ready", *self.state.glob("n*.pid")):
            path.unlink(missing_ok=True)

    def _ended(self, pid: int) -> bool:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # where it is this process's own child
        return not self.running()


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("up", "exec", "kill-node", "start-node", "down"):
        verbs.add_parser(verb).add_argument("--state", type=Path, required=True, help="the cluster's folder")
    up, run = verbs.choices["up"], verbs.choices["exec"]
    up.add_argument("--nodes", type=int, default=2)
    up.add_argument("--cpus", type=int, default=2, help="of each node, as Slurm counts")
    up.add_argument("--hold", action="store_true", help="stay, and take the cluster down when the input ends")
    run.add_argument("--node", default="head")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND…")
    for verb in ("kill-node", "start-node"):
        verbs.choices[verb].add_argument("name")
    return parser.parse_args()


def bring_up(cluster: Cluster, options: argparse.Namespace) -> None:
    if reason := missing():
        print(f"minicluster.py: a cluster cannot be had here: {reason}", file=sys.stderr)
        raise SystemExit(UNAVAILABLE)
    try:
        cluster.up(options.nodes, options.cpus, options.hold)
        if options.hold:
            print("up", flush=True)
            sys.stdin.read()
    finally:
        if options.hold or sys.exc_info()[0]:
            cluster.down()


def main() -> None:
    # Where munged, slurmctld, slurmd and ip lie, and where not every user's PATH leads.
    os.environ["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    options = read_options()
    cluster = Cluster(options.state)
    match options.verb:
        case "up":
            bring_up(cluster, options)
        case "exec":
            argv = cluster.command(options.node, options.argv, Path.cwd())
            os.execvpe(argv[0], argv, cluster.environment())
        case "kill-node":
            cluster.kill_node(options.name)
        case "start-node":
            cluster.start_node(options.name)
        case "down":
            cluster.down()


if __name__ == "__main__":
    main()
