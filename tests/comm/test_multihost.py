"""Collectives between hosts. The serial pass starts this file again, and test_communicator.py, on
two hosts made of network namespaces; on a cluster, `mpirun pytest` over several nodes runs the
same.
"""

import itertools
import os
import socket
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from mpillm.comm.buffers import as_buffer
from mpillm.comm.communicator import Communicator
from mpillm.comm.executors import dispatch
from mpillm.comm.executors.blockwise import make_executor

TWO_HOSTS = Path(__file__).parents[1] / "fixtures" / "two_hosts.sh"
UNAVAILABLE = 77
# Of test_communicator.py what is as true of several hosts as of one.
GROUP_TESTS = (
    "test_operations",
    "test_prepared_runs_again_and_again",
    "test_handles_in_any_order",
    "test_handles_are_polled_to_their_end",
    "test_neighbours",
)
START = "import os, sys; os.execvp('sh', ['sh', *sys.argv[1:]])"
COUNT = 2**18 + 4


@pytest.fixture(scope="module")
def group(comm):
    made = Communicator(comm)
    if len(made.nodes) < 2:
        made.free()
        pytest.skip("all ranks are on one host")
    yield made
    made.free()


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    """Two levels go in several pieces at the counts of this file."""
    monkeypatch.setattr(dispatch, "PIECE_BYTES", 300_000)


@pytest.mark.multihost
@pytest.mark.parametrize("ranks_per_host", ["1", "2", "2,1"])
def test_on_two_hosts(python, ranks_per_host):
    def on_two_hosts(*command):
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        return python(
            "-c",
            START,
            TWO_HOSTS,
            "--rate",
            "1gbit",
            "--ranks-per-host",
            ranks_per_host,
            *command,
            PATH=path,
        )

    # Not `true`: Open MPI's mpirun can wait endlessly for processes that end at once.
    tried = on_two_hosts("sleep", "1")
    if tried.returncode == UNAVAILABLE:
        pytest.skip(tried.stderr.strip().splitlines()[-1])
    assert tried.returncode == 0, tried.stdout + tried.stderr
    tests = [
        __file__,
        *(f"{Path(__file__).with_name('test_communicator.py')}::{name}" for name in GROUP_TESTS),
    ]
    done = on_two_hosts("python", "-m", "pytest", "-q", "--color=no", *tests)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all ranks are on one host" not in done.stdout


def array_of(group, count, element="float32", turn=0):
    generator = np.random.default_rng([count, group.rank, turn])
    return torch.from_numpy(generator.standard_normal(count)).to(getattr(torch, element))


def test_nodes_are_told_apart_by_their_hosts(group):
    hosts = group.comm.allgather(socket.gethostname())
    for ranks in group.nodes:
        assert len({hosts[rank] for rank in ranks}) == 1
    assert sorted(itertools.chain(*group.nodes)) == list(range(group.size))
    assert len({hosts[ranks[0]] for ranks in group.nodes}) == len(group.nodes)
    assert ("two-level" in group.algorithms("allreduce")) == (group.size > len(group.nodes))
    assert "shared" not in group.algorithms("allreduce")


@pytest.mark.parametrize("element", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["sum", "mean", "max"])
def test_every_algorithm_agrees_with_the_reference(group, op, element):
    tolerance = 1e-5 if element == "float32" else 5e-2
    for count in (3, COUNT):
        expected = array_of(group, count, element)
        group.allreduce(expected, op=op, algorithm="reference")
        for algorithm in group.algorithms("allreduce"):
            found = array_of(group, count, element)
            group.allreduce(found, op=op, algorithm=algorithm)
            torch.testing.assert_close(
                found, expected, rtol=tolerance, atol=tolerance, msg=algorithm
            )


@pytest.mark.parametrize("element", ["float32", "bfloat16"])
def test_a_fixed_order_gives_the_same_bits_on_any_way(group, element):
    found = {}
    names = ["reference", "rabenseifner", "recursive-doubling", "binomial"]
    if "two-level" in group.algorithms("allreduce") and group.node_map.keeps_order:
        names.append("two-level")
    for algorithm in names:
        tensor = array_of(group, COUNT, element)
        group.allreduce(tensor, algorithm=algorithm, fixed_order=True)
        found[algorithm] = as_buffer(tensor).octets.tobytes()
    assert len(set(found.values())) == 1, names


def test_handles_of_two_levels_in_any_order(group):
    """They share the team of the node, so each begins when the one before it is done, in any order
    of waits.
    """
    if "two-level" not in group.algorithms("allreduce"):
        pytest.skip("one rank a host has one level")
    arrays = [
        np.full(count, group.rank + 1.0, np.float32) for count in (10, 200_000, 1, COUNT, 70_000)
    ]
    handles = [group.prepare("allreduce", array, algorithm="two-level").start() for array in arrays]
    for handle in reversed(handles) if group.rank % 2 else handles:
        handle.wait()
    assert all((array == sum(range(1, group.size + 1))).all() for array in arrays)


def sent_over_the_network():
    """Return the bytes that this host sent: the counters of all interfaces but loopback."""
    rows = (line.partition(":") for line in Path("/proc/net/dev").read_text().splitlines()[2:])
    return sum(int(numbers.split()[8]) for name, _, numbers in rows if name.strip() != "lo")


def test_two_levels_send_each_byte_once_a_host(group, monkeypatch):
    """Between two hosts: the array once each way. One level sends it twice from each rank but for
    its neighbours'.
    """
    if "two-level" not in group.algorithms("allreduce") or len(group.nodes) != 2:
        pytest.skip("needs two hosts, of which one has two ranks")
    runs = []

    def noted(*arguments):
        runs.append(make_executor(*arguments))
        return runs[-1]

    monkeypatch.setattr(dispatch, "make_executor", noted)
    array = array_of(group, COUNT)
    nbytes = 4 * COUNT
    ready = group.prepare("allreduce", array, algorithm="two-level")
    group.comm.Barrier()
    before = sent_over_the_network()
    ready.run()
    group.comm.Barrier()
    over_network = group.comm.allgather(sent_over_the_network() - before)
    sent = group.comm.allgather(sum(run.sent_bytes for run in runs))
    assert [sum(sent[rank] for rank in ranks) for ranks in group.nodes] == [nbytes, nbytes]
    if socket.gethostname() in ("host1", "host2"):  # none but us is on this link
        for ranks in group.nodes:
            assert nbytes <= over_network[ranks[0]] < 1.2 * nbytes


def test_only_within_a_node_blocks_come_in_pieces(group, monkeypatch):
    given = []

    def noted(*arguments):
        given.append(arguments[3].added_bytes)
        return make_executor(*arguments)

    monkeypatch.setattr(dispatch, "make_executor", noted)
    if group.size > 1:
        group.prepare("allreduce", array_of(group, COUNT), algorithm="ring")
        assert given == [dispatch.ADDED_BYTES if len(group.nodes) == 1 else None]
