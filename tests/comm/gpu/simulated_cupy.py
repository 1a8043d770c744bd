"""A simulated GPU: the part of CuPy's API that mpillm uses, on CPU memory, with late streams.

Work enqueued in a stream waits until an event is queried or waited for. Then the queues advance in
random order, one piece of work at a time. So missing order between pieces of work gives wrong data.
"""

import ctypes
import itertools
import random
import sys
from collections import deque
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from mpi4py import MPI


class Token:
    """One recording of an event."""

    done = False

    def reach(self):
        self.done = True


class Machine:
    """All streams and events of one process."""

    def __init__(self, seed):
        self.chance = random.Random(seed)
        self.streams, self.events, self.entered = {}, {}, []
        self.numbers = itertools.count(100)
        self.busiest = 0

    def step(self, stream):
        """Do the first piece of work, if it need not wait; whether it was done."""
        if not stream.queue or (isinstance(stream.queue[0], Token) and not stream.queue[0].done):
            return False
        work = stream.queue.popleft()
        if not isinstance(work, Token):
            work()
        return True

    def move(self, steps):
        for _ in range(steps):
            waiting = [stream for stream in self.streams.values() if stream.queue]
            if waiting:
                self.step(self.chance.choice(waiting))

    def until(self, condition):
        while not condition():
            self.busiest = max(
                self.busiest, sum(bool(stream.queue) for stream in self.streams.values())
            )
            moved = [
                self.step(stream)
                for stream in self.chance.sample(list(self.streams.values()), len(self.streams))
            ]
            assert any(moved) or condition(), "streams wait for each other in a circle"

    def now(self):
        return self.entered[-1] if self.entered else self.streams[0]

    def enqueued(self, function):
        """Wrap `function(target, source, out)` to run on arrays' memory in the current stream."""

        def on_stream(target, source, out=None):
            given = [
                getattr(array, "memory", array)
                for array in (target, source, target if out is None else out)
            ]
            self.now().queue.append(lambda: function(*given))

        return on_stream


class Stream:
    machine: Machine

    def __init__(self, non_blocking=False, handle=None):
        assert non_blocking or handle is not None
        self.ptr = next(self.machine.numbers) if handle is None else handle
        self.queue = deque()
        self.machine.streams[self.ptr] = self

    @classmethod
    def from_external(cls, other):
        version, handle = other.__cuda_stream__()
        assert version == 0
        return cls.machine.streams[handle]

    def wait_event(self, event):
        if event.token is not None:
            self.queue.append(event.token)

    def synchronize(self):
        self.machine.until(lambda: not self.queue)

    def __enter__(self):
        self.machine.entered.append(self)
        return self

    def __exit__(self, *_):
        self.machine.entered.pop()


class Event:
    machine: Machine

    def __init__(self, disable_timing=False):
        self.ptr, self.token = next(self.machine.numbers), None
        self.machine.events[self.ptr] = self

    def record(self, stream):
        self.token = Token()
        stream.queue.append(self.token.reach)

    @property
    def done(self):
        self.machine.move(2)
        return self.token is None or self.token.done

    def synchronize(self):
        token = self.token
        self.machine.until(lambda: token is None or token.done)


class NdArray:
    """Not a NumPy array, as CuPy's is none; `memory` is one."""

    def __init__(self, shape, dtype, memory):
        if not isinstance(memory, np.ndarray):
            memory = (
                memory_at(memory.ptr, int(np.prod(shape)) * np.dtype(dtype).itemsize)
                .view(dtype)
                .reshape(shape)
            )
        self.memory, self.dtype, self.size = memory, memory.dtype, memory.size
        self.data, self.device = SimpleNamespace(ptr=memory.ctypes.data), SimpleNamespace(id=0)

    def __getitem__(self, part):
        return array_of(self.memory[part])

    @property
    def __cuda_array_interface__(self):
        return {**self.memory.__array_interface__, "stream": None, "version": 3}


def array_of(values):
    return NdArray(values.shape, values.dtype, values)


def memory_at(pointer, nbytes):
    return np.frombuffer(
        (ctypes.c_uint8 * nbytes).from_address(pointer) if nbytes else b"", np.uint8
    )


def bfloat16_at(raw):
    return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)


def kernel_of(machine, name):
    """Make a kernel of device_arithmetic.py, by torch."""

    def combine(a, b, out):
        function = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[
            name.rsplit("_", 1)[1]
        ]
        bfloat16_at(out).copy_(function(bfloat16_at(a), bfloat16_at(b)))

    def scale(x, factor, out):
        if "bfloat16" in name:
            bfloat16_at(out).copy_(bfloat16_at(x).float() * factor)
        else:
            out[...] = x * x.dtype.type(factor)

    return machine.enqueued(scale if name.endswith("scale") else combine)


class Nccl:
    """NCCL by MPI: a call first finishes the work before it in its stream. Kinds are dtypes."""

    machine: Machine

    def __init__(self, size, ticket, rank):
        assert ticket == b"ticket"
        self._comm = MPI.COMM_WORLD.Dup()
        self._requests = []

    grouped: "list[list]"

    def _do(self, stream, work, last=False):
        self.machine.streams[stream].synchronize()
        if self.grouped:
            # Receives come after the sends of a group: each rank's sends are what others wait for.
            self.grouped[-1].insert(len(self.grouped[-1]) if last else 0, work)
        else:
            work()

    def _bytes(self, pointer, count, kind):
        return memory_at(pointer, count * (2 if kind == "bfloat16" else np.dtype(kind).itemsize))

    def _sum(self, parts, target, kind, op, first):
        """Write the reduction of all parts, from byte `first` on, to the bytes `target`."""
        as_rows = (
            bfloat16_at if kind == "bfloat16" else lambda raw: torch.from_numpy(raw.view(kind))
        )
        rows = [
            as_rows(np.frombuffer(bytearray(part), np.uint8)[first : first + target.size])
            for part in parts
        ]
        function = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[op]
        total = rows[0]
        for row in rows[1:]:
            total = function(total, row)
        if target.size:
            as_rows(target).copy_(total)

    def _reduced(self, source, target, count, kind, op, takers):
        parts = self._comm.allgather(self._bytes(source, count, kind).tobytes())
        if self._comm.rank in takers:
            self._sum(parts, self._bytes(target, count, kind), kind, op, 0)

    def allReduce(self, source, target, count, kind, op, stream):  # noqa: N802 - CuPy's name
        self._do(
            stream,
            lambda: self._reduced(source, target, count, kind, op, range(self._comm.size)),
            last=True,
        )

    def reduce(self, source, target, count, kind, op, root, stream):
        self._do(stream, lambda: self._reduced(source, target, count, kind, op, [root]), last=True)

    def reduceScatter(self, source, target, count, kind, op, stream):  # noqa: N802 - CuPy's name
        def work():
            parts = self._comm.allgather(
                self._bytes(source, count * self._comm.size, kind).tobytes()
            )
            into = self._bytes(target, count, kind)
            self._sum(parts, into, kind, op, self._comm.rank * into.size)

        self._do(stream, work)

    def allGather(self, source, target, count, kind, stream):  # noqa: N802 - CuPy's name
        def work():
            parts = self._comm.allgather(self._bytes(source, count, kind).tobytes())
            self._bytes(target, count * self._comm.size, kind)[...] = np.frombuffer(
                b"".join(parts), np.uint8
            )

        self._do(stream, work)

    def broadcast(self, source, target, count, kind, root, stream):
        def work():
            part = self._comm.bcast(self._bytes(source, count, kind).tobytes(), root)
            self._bytes(target, count, kind)[...] = np.frombuffer(part, np.uint8)

        self._do(stream, work, last=True)

    def send(self, source, count, kind, peer, stream):
        def work():
            self._requests.append(
                self._comm.isend(self._bytes(source, count, kind).tobytes(), peer)
            )

        self._do(stream, work)

    def recv(self, target, count, kind, peer, stream):
        def work():
            self._bytes(target, count, kind)[...] = np.frombuffer(
                self._comm.recv(source=peer), np.uint8
            )

        self._do(stream, work, last=True)

    def destroy(self):
        for request in self._requests:
            request.wait()
        self._comm.Free()


def nccl_of(machine):
    nccl = ModuleType("cupy.cuda.nccl")
    names = (
        "FLOAT32",
        "FLOAT64",
        "FLOAT16",
        "BFLOAT16",
        "INT8",
        "UINT8",
        "INT32",
        "UINT32",
        "INT64",
        "UINT64",
    )
    grouped = []

    def group_end():
        for work in grouped.pop():
            work()

    vars(nccl).update(
        {f"NCCL_{name}": name.lower() for name in names},
        available=True,
        get_unique_id=lambda: b"ticket",
        NcclCommunicator=type("Communicator", (Nccl,), {"machine": machine, "grouped": grouped}),
        NCCL_SUM="sum",
        NCCL_MAX="max",
        NCCL_MIN="min",
        groupStart=lambda: grouped.append([]),
        groupEnd=group_end,
    )
    return nccl


def runtime_of(machine):
    def memcpy_async(target, source, nbytes, kind, handle):
        machine.streams[handle].queue.append(lambda: ctypes.memmove(target, source, nbytes))

    return SimpleNamespace(
        memcpyAsync=memcpy_async,
        memcpyDeviceToHost=2,
        memcpyHostToDevice=1,
        eventRecord=lambda event, stream: machine.events[event].record(machine.streams[stream]),
        streamWaitEvent=lambda stream, event: machine.streams[stream].wait_event(
            machine.events[event]
        ),
        deviceGetPCIBusId=lambda number: f"0000:{MPI.COMM_WORLD.rank:02x}:00.0",
        getDevice=lambda: 0,
        pointerGetAttributes=lambda pointer: SimpleNamespace(device=0),
    )


@contextmanager
def device(number):
    assert number == 0
    yield


def build(seed=0):
    """Make the modules cupy, cupy.cuda, cupy.cuda.nccl and cupyx, and their machine."""
    machine = Machine(seed)
    nccl, cuda, cupy, cupyx = nccl_of(machine), *map(ModuleType, ("cupy.cuda", "cupy", "cupyx"))
    stream = type("Stream", (Stream,), {"machine": machine})
    stream(handle=0)
    vars(cuda).update(
        Stream=stream,
        Event=type("Event", (Event,), {"machine": machine}),
        Device=device,
        runtime=runtime_of(machine),
        nccl=nccl,
        get_current_stream=machine.now,
        UnownedMemory=lambda pointer, nbytes, owner, number: pointer,
        MemoryPointer=lambda pointer, offset: SimpleNamespace(ptr=pointer + offset),
    )
    vars(cupy).update(
        cuda=cuda,
        ndarray=NdArray,
        ElementwiseKernel=lambda *described, **_: kernel_of(machine, described[3]),
        empty=lambda count, dtype: array_of(np.full(count, 77, dtype)),
        asarray=array_of,
        add=machine.enqueued(lambda a, b, out: np.add(a, b, out=out)),
        maximum=machine.enqueued(lambda a, b, out: np.maximum(a, b, out=out)),
        minimum=machine.enqueued(lambda a, b, out: np.minimum(a, b, out=out)),
        copyto=machine.enqueued(lambda target, source, out: np.copyto(target, source)),
    )
    cupyx.empty_pinned = lambda count, dtype: np.full(count, 99, dtype)
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.nccl": nccl, "cupyx": cupyx}, machine


@contextmanager
def pretended(seed=0):
    """sys.modules with a simulated CuPy in it; gives (cupy, machine)."""
    from mpillm.comm.gpu import device_arithmetic

    modules, machine = build(seed)
    before = {name: sys.modules.get(name) for name in modules}
    caches = (device_arithmetic._bfloat16_combine, device_arithmetic._scaling)
    for cache in caches:
        cache.cache_clear()
    sys.modules.update(modules)
    try:
        yield modules["cupy"], machine
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
        for cache in caches:
            cache.cache_clear()
