"""How many ranks go along each axis: plain numbers, which a login node can check before it queues a job."""

from mpillm.comm.mesh import describe
from mpillm.errors import LayoutError
from mpillm.parallel.settings import ParallelSettings

# So many of the legal layouts are told in an error.
TOLD_LAYOUTS = 6


def mesh_sizes(settings: ParallelSettings, ranks: int, layers: int, batch: int) -> dict[str, int]:
    """The sizes of the axes for a job of `ranks`. Raises LayoutError, with the layouts that are legal for a model of
    `layers` and a batch of `batch` sequences, where the settings do not fit.
    """
    pipeline, data = settings.pipeline, 0 if settings.data == "auto" else settings.data
    wanted = {"data": data or max(1, ranks // pipeline), "pipeline": pipeline}
    needed = wanted["data"] * pipeline
    if needed == ranks:
        _check_shares(wanted, ranks, layers, batch)
        return wanted
    have = f"the job has {ranks}; {_way_out(ranks, layers, batch)}"
    if not data:
        below, above = ranks // pipeline * pipeline, (ranks // pipeline + 1) * pipeline
        starts = f"{below} or {above}" if below else f"{above}"
        raise LayoutError(
            f"parallel.pipeline = {pipeline} must divide the ranks, and {have}, or start with {starts} ranks"
        )
    raise LayoutError(
        f"parallel.data = {data} × parallel.pipeline = {pipeline} needs {needed} rank{'s' * (needed > 1)}, and {have}, "
        f"or start with {needed}"
    )


def _check_shares(sizes: dict[str, int], ranks: int, layers: int, batch: int) -> None:
    """Raise LayoutError where an axis is longer than what it shares out."""
    if sizes in legal_layouts(ranks, layers, batch):
        return
    data, pipeline = sizes["data"], sizes["pipeline"]
    faults = [
        f"a global batch of {batch} sequences cannot be shared by {data} ranks"
        * (batch % data > 0),
        f"{layers} layers cannot be shared by {pipeline} stages" * (pipeline > layers),
    ]
    raise LayoutError(f"{' and '.join(filter(None, faults))}; {_way_out(ranks, layers, batch)}")


def legal_layouts(ranks: int, layers: int, batch: int) -> list[dict[str, int]]:
    """All sizes of the axes that `ranks` can have: the data axis divides the batch, the pipeline has a layer a rank."""
    pairs = [
        (ranks // pipeline, pipeline)
        for pipeline in range(1, min(ranks, layers) + 1)
        if ranks % pipeline == 0
    ]
    return [{"data": data, "pipeline": pipeline} for data, pipeline in pairs if batch % data == 0]


def _way_out(ranks: int, layers: int, batch: int) -> str:
    legal = [describe(layout) for layout in legal_layouts(ranks, layers, batch)]
    if not legal:
        return (
            f"no layout of {ranks} ranks shares a batch of {batch} sequences and {layers} layer{'s' * (layers > 1)}: "
            f"take a train.batch that {ranks} divides"
        )
    told = " or ".join(legal[:TOLD_LAYOUTS]) + (
        f" (and {len(legal) - TOLD_LAYOUTS} more)" * (len(legal) > TOLD_LAYOUTS)
    )
    return f'take {told} (parallel.data = "auto" is whatever the pipeline leaves)'
