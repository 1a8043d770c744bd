"""Waits of ranks for work elsewhere: they sleep."""

import time

from mpillm.comm.waiting import patient_barrier, patient_bcast, wait_patiently


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
