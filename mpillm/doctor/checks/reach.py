"""Reach: whether the names of the allocation's hosts resolve, and their ssh port answers."""

import errno
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from mpillm.doctor.check_base import Check, JobView
from mpillm.doctor.findings import Finding, hosts_text
from mpillm.launch.current_job import job_hosts

AREA = "hosts"
SSH_PORT = 22
CONNECT_SECONDS, ALL_SECONDS = 2.0, 15.0

ANSWERS, REFUSED, NO_NAME, NO_ANSWER = "ssh answers", "ssh is refused", "no address", "no answer"
THIS_HOST = "this host"


class ReachCheck(Check):
    name, area = "reach", AREA

    def examine_job(self, job: JobView) -> Iterable[Finding]:
        allocation, system = job_hosts(job.environment)
        starter = "" if system is None or system.ranks_need_ssh else system.launcher
        # Ranks that run have reached each other already.
        hosts = list(job.options.hosts) or ([] if job.ranks > 1 else allocation)
        return judge_hosts(try_hosts(hosts, os.uname().nodename), starter)


def try_hosts(hosts: Sequence[str], own: str) -> dict[str, str]:
    """Try to reach all hosts at once; return host → result. `own`, this host, needs no network."""
    found = dict.fromkeys(hosts, NO_ANSWER)
    # Daemon threads: a call of the system's resolver cannot be stopped.
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
        host: THIS_HOST for host in hosts if host.partition(".")[0] == own.partition(".")[0]
    }


def try_host(host: str, port: int = SSH_PORT) -> str:
    """Connect to the port; return one of the constants above, or the system's error text."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        # A name with letters that no host's name has.
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


def judge_hosts(results: Mapping[str, str], starter: str) -> list[Finding]:
    """Make one finding for each result, with all hosts that have it.

    `starter`: the batch system's launcher that needs no ssh; "": none is known.
    """
    groups: dict[str, list[str]] = {}
    for host, result in results.items():
        groups.setdefault(result, []).append(host)
    return [judge_result(result, hosts, starter) for result, hosts in groups.items()]


def judge_result(result: str, hosts: Sequence[str], starter: str) -> Finding:
    name = hosts_text(hosts)
    if result in (ANSWERS, THIS_HOST):
        return Finding(AREA, name, "ok", result)
    if result == REFUSED:
        if starter:
            return Finding(AREA, name, "ok", f"reached; ssh is refused, and {starter} needs none")
        found = "reached, but ssh is refused, by which mpirun starts its daemons"
        return Finding(
            AREA, name, "warning", found, "start sshd there, or start ranks by the scheduler (srun)"
        )
    if result == NO_NAME:
        found = "the name has no address here"
        remedy = (
            "is it spelt as the scheduler spells it? "
            f"see `getent hosts {hosts[0]}`, /etc/hosts and the DNS"
        )
        return Finding(AREA, name, "error", found, remedy)
    detail = re.sub(rf"^{NO_ANSWER}:? ?", "", result) or f"within {CONNECT_SECONDS:g} s"
    found = f"cannot be reached: no answer at port {SSH_PORT} ({detail})"
    remedy = (
        f"is it up, and in this network (ping {hosts[0]}, ip route get ADDRESS)? "
        "does a firewall block the port?"
    )
    return Finding(AREA, name, "error", found, remedy)
