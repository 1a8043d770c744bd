"""The peak of tensors' memory in a piece of work, as torch counts it."""

import gc
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


def peak_tensor_bytes(work: Callable[[], object], device: str = "cpu") -> int:
    """Return the most bytes of tensors that `work` holds at once, above those before it.

    On the CPU torch's profiler counts each allocation; on a GPU its allocator does.
    """
    # Garbage of earlier work would be freed in this one.
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = (int(event.nbytes()) for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(sizes, initial=0))
