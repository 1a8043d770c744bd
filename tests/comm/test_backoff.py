"""Backing off on cores that others need, and the table of constants that C and Python share."""

import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpillm.comm import kernel
from mpillm.comm.backoff import Backoff, share_cores
from mpillm.comm.kernel import WAITING


def test_the_table_of_waiting_is_that_of_the_c_sources():
    text = (Path(kernel.__file__).parent / "csrc" / "flags.h").read_text(encoding="utf-8")
    defined = dict(re.findall(r"#define ([A-Z_]+) ([0-9.e-]+)$", text, re.M))
    del defined["LINE_BYTES"]
    assert {name: float(value) for name, value in defined.items()} == dict(WAITING)
    with pytest.raises(TypeError):
        WAITING["SPINS"] = 1


def test_ranks_that_share_cores(comm, monkeypatch):
    def own(cores):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
        return share_cores(comm)

    assert not own({comm.rank})  # each is bound to its own
    assert not own(range(comm.size))
    assert own({0}) == (comm.size > 1)


@pytest.fixture
def sleeps(monkeypatch):
    """Collect the seconds of each sleep."""
    taken, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (taken.append(seconds), sleep(seconds)))
    return taken


def test_a_core_that_others_take_is_left_to_them_for_a_while(sleeps, monkeypatch):
    sleeps_in_all = int(WAITING["CROWDED_SLEEPS"])
    back_off = Backoff()
    monkeypatch.setattr(os, "sched_yield", lambda: None)
    monkeypatch.setattr(
        time, "monotonic", itertools.count(0, WAITING["TAKEN_SECONDS"] / 2).__next__
    )
    for _ in range(10):
        back_off()
    assert not sleeps
    monkeypatch.setattr(time, "monotonic", itertools.count().__next__)
    for _ in range(sleeps_in_all + 1):
        back_off()
    assert sleeps == [WAITING["CROWDED_SLEEP_SECONDS"]] * sleeps_in_all
    monkeypatch.setattr(
        time, "monotonic", itertools.count(0, WAITING["TAKEN_SECONDS"] / 2).__next__
    )
    for _ in range(10):
        back_off()
    assert len(sleeps) == sleeps_in_all


@pytest.mark.usefixtures("processes")
def test_a_busy_neighbour_is_noticed(sleeps):
    core = {min(os.sched_getaffinity(0))}
    before = os.sched_getaffinity(0)
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(neighbour.pid, core)
        os.sched_setaffinity(0, core)
        back_off, given_up = Backoff(), time.monotonic() + 20
        while not sleeps:
            assert time.monotonic() < given_up
            back_off()
    finally:
        os.sched_setaffinity(0, before)
        neighbour.kill()
        neighbour.wait()
