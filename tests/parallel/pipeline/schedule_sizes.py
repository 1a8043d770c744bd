"""The sizes that the tests of schedules go through, and what they compute for each."""

import hashlib
from itertools import product

from mpi4py import MPI

from mpillm.parallel.pipeline.schedule_catalog import SCHEDULES, make_schedule
from mpillm.parallel.pipeline.schedule_csv import write_schedule
from mpillm.parallel.pipeline.simulate import Costs, simulate
from mpillm.system.plugins import load_plugin


def sizes(name, most=16):
    """List (name, p, m, v) of all sizes that the schedule allows, p to 8 and m to `most`."""
    rule = load_plugin(name, SCHEDULES, "pipeline schedule")
    return [
        (name, p, m, rule.chunks + more)
        for p, m in product(range(1, 9), range(1, most + 1))
        if m >= rule.microbatches_a_rank * p
        for more in (range(3) if rule.more_chunks else range(1))
    ]


def grid(name, most=16):
    """List this rank's share of `sizes`; a rank that fails ends the job."""
    return sizes(name, most)[MPI.COMM_WORLD.rank :: MPI.COMM_WORLD.size]


def played(case, **costs):
    """Simulate a case of `sizes`, each stage with the same costs."""
    schedule = make_schedule(*case)
    return simulate(schedule, Costs.even(schedule.stages, **costs))


def rows_digest(name):
    """Digest the rows of all sizes. Where it changes, every run with the schedule changes."""
    digest = hashlib.sha256()
    for case in sizes(name):
        digest.update(write_schedule(make_schedule(*case)).encode() + b"\n")
    return digest.hexdigest()[:16]
