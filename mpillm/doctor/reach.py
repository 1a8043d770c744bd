"""Whether the hosts of an allocation can be reached: their names resolve, and something answers at the other end."""

import errno
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpillm.doctor.findings import Finding, hosts_text
from mpillm.doctor.subprocesses import run

AREA = "hosts"
SSH_PORT = 22
CONNECT_SECONDS, ALL_SECONDS, LIST_SECONDS = 2.0, 15.0, 10.0

ANSWERS, REFUSED, NO_NAME, NO_ANSWER = "ssh answers", "ssh is refused", "no address", "no answer"


def allocated(environment: Mapping[str, str]) -> tuple[list[str], str]:
    """The hosts that the scheduler gave this job, each once, and the scheduler's name; [] and "" outside of a job."""
    if environment.get("SLURM_JOB_NODELIST"):
        return _slurm_hosts(environment), "Slurm"
    if environment.get("PBS_NODEFILE"):
        return _hosts_of_file(environment["PBS_NODEFILE"]), "PBS"
    if environment.get("LSB_DJOB_HOSTFILE"):
        return _hosts_of_file(environment["LSB_DJOB_HOSTFILE"]), "LSF"
    return [], ""


def _slurm_hosts(environment: Mapping[str, str]) -> list[str]:
    scontrol = shutil.which("scontrol", path=environment.get("PATH", ""))
    listed = environment["SLURM_JOB_NODELIST"]
    if scontrol:
        ended = run([scontrol, "show", "hostnames", listed], environment, LIST_SECONDS)
        if ended.code == 0:
            return ended.out.split()
    return [] if "[" in listed else listed.split(",")


def _hosts_of_file(path: str) -> list[str]:
    """A line a slot; LSF names the host that the job was sent from, too, which is one of the job's."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError:
        return []
    return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))


def try_hosts(hosts: Sequence[str], own: str) -> dict[str, str]:
    """Host → what came of reaching it, all at once; `own` is this one's name, which needs no network."""
    found = dict.fromkeys(hosts, NO_ANSWER)
    # Daemons: the system's resolver takes its own time and cannot be stopped.
    threads = [
        threading.Thread(target=lambda host=host: found.update({host: try_host(host)}), daemon=True)
        for host in hosts
        if host.partition(".")[0] != own.partition(".")[0]
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + ALL_SECONDS
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(found) | {
        host: "this host" for host in hosts if host.partition(".")[0] == own.partition(".")[0]
    }


def try_host(host: str, port: int = SSH_PORT) -> str:
    """One of the constants above, or the system's word for what went wrong."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return NO_NAME
    result = NO_ANSWER
    for family, kind, protocol, _, address in addresses[:2]:
        with socket.socket(family, kind, protocol) as tried:
            tried.settimeout(CONNECT_SECONDS)
            try:
                tried.connect(address)
            except TimeoutError:
                continue
            except ConnectionRefusedError:
                return REFUSED
            except OSError as failure:
                result = f"{NO_ANSWER}: {os.strerror(failure.errno or errno.EIO)}"
                continue
            return ANSWERS
    return result


def judge_hosts(results: Mapping[str, str], scheduler: str) -> list[Finding]:
    """A finding for each outcome, with all hosts that it is true of."""
    groups: dict[str, list[str]] = {}
    for host, result in results.items():
        groups.setdefault(result, []).append(host)
    return [judge_result(result, hosts, scheduler) for result, hosts in groups.items()]


def judge_result(result: str, hosts: Sequence[str], scheduler: str) -> Finding:
    name = hosts_text(hosts)
    if result in (ANSWERS, "this host"):
        return Finding(AREA, name, "ok", result)
    if result == REFUSED:
        if scheduler == "Slurm":
            return Finding(AREA, name, "ok", "reached; ssh is refused, and srun needs none")
        found = "reached, but ssh is refused, by which mpirun starts its daemons"
        return Finding(
            AREA, name, "warning", found, "start sshd there, or start ranks by the scheduler (srun)"
        )
    if result == NO_NAME:
        found = "the name has no address here"
        remedy = f"is it spelt as the scheduler spells it? see `getent hosts {hosts[0]}`, /etc/hosts and the DNS"
        return Finding(AREA, name, "error", found, remedy)
    detail = re.sub(rf"^{NO_ANSWER}:? ?", "", result) or f"within {CONNECT_SECONDS:g} s"
    found = f"cannot be reached: no answer at port {SSH_PORT} ({detail})"
    remedy = f"is it up, and in this network (ping {hosts[0]}, ip route get ADDRESS)? does a firewall stand between?"
    return Finding(AREA, name, "error", found, remedy)
