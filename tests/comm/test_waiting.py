"""Waiting that lets the core go."""

import itertools
import os
import subprocess
import sys
import time

import pytest

from mpillm.comm import waiting
from mpillm.comm.waiting import Backoff, patient_barrier, patient_bcast, share_cores, wait_patiently


def test_waiting_ranks_sleep(comm):
    comm.Barrier()
    started, burnt = time.monotonic(), time.process_time()
    if comm.rank == 0:
        time.sleep(0.5)
    patient_barrier(comm)
    assert time.monotonic() - started >= 0.5
    if comm.rank:
        assert time.process_time() - burnt < 0.25


def test_bcast_from_each_root(comm):
    for root in range(comm.size):
        value = {"vocabulary": [root]} if comm.rank == root else None
        assert patient_bcast(comm, value, root) == {"vocabulary": [root]}


def test_limit(comm):
    private = comm.Dup()
    if comm.rank == 0:
        request = private.Ibarrier()
        arrived = wait_patiently(request, 0.05)
        assert arrived == (comm.size == 1)
        comm.Barrier()
    else:
        comm.Barrier()
        request = private.Ibarrier()
    request.Wait()
    private.Free()


def test_ranks_that_share_cores(comm, monkeypatch):
    def own(cores):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
        return share_cores(comm)

    assert not own({comm.rank})  # each is bound to its own
    assert not own(range(comm.size))
    assert own({0}) == (comm.size > 1)


@pytest.fixture
def naps(monkeypatch):
    """How long each took."""
    taken, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (taken.append(seconds), sleep(seconds)))
    return taken


def test_who_offers_a_core_that_others_take_sleeps_a_while(naps, monkeypatch):
    breather = Backoff()
    monkeypatch.setattr(os, "sched_yield", lambda: None)
    monkeypatch.setattr(time, "monotonic", itertools.count(0, waiting.TAKEN_SECONDS / 2).__next__)
    for _ in range(10):
        breather()
    assert not naps
    monkeypatch.setattr(time, "monotonic", itertools.count().__next__)
    for _ in range(waiting.NAPS + 1):
        breather()
    assert naps == [waiting.NAP_SECONDS] * waiting.NAPS
    monkeypatch.setattr(time, "monotonic", itertools.count(0, waiting.TAKEN_SECONDS / 2).__next__)
    for _ in range(10):
        breather()
    assert len(naps) == waiting.NAPS


def test_what_has_not_moved_for_a_while_is_looked_at_less_often(naps, monkeypatch):
    breather, now = Backoff(), [1.0]
    monkeypatch.setattr(os, "sched_yield", lambda: None)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def sleeps(seconds, told=True):
        """Whether the breath `seconds` later is a nap."""
        now[0] += seconds
        before = len(naps)
        breather(told)
        return len(naps) > before

    assert not sleeps(0)
    assert not sleeps(1, told=False)
    assert sleeps(0)
    breather.moved()
    assert not sleeps(1)  # the look before it found something, however long ago that began
    assert not sleeps(waiting.QUIET_SECONDS / 2)
    assert sleeps(waiting.QUIET_SECONDS)


@pytest.mark.alone
def test_a_busy_neighbour_is_noticed(naps):
    core = {min(os.sched_getaffinity(0))}
    before = os.sched_getaffinity(0)
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(neighbour.pid, core)
        os.sched_setaffinity(0, core)
        breather, given_up = Backoff(), time.monotonic() + 20
        while not naps:
            assert time.monotonic() < given_up
            breather()
    finally:
        os.sched_setaffinity(0, before)
        neighbour.kill()
        neighbour.wait()
