"""How the ranks share a training step: the recipe's section [parallel]."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

Positive = Annotated[int, Gt(0)]


@dataclass(frozen=True)
class ParallelSettings:
    """How the ranks share a training step."""

    data: Literal["auto"] | Annotated[int, Ge(0)] = "auto"
    """Ranks that share the batch; auto, or 0: all that the pipeline leaves."""
    pipeline: Annotated[int, Gt(0)] = 1
    """Ranks that share the layers."""
    schedule: str = "1f1b"
    """Who computes what when along the pipeline: gpipe, 1f1b, interleaved, zb-h1, zb-v, dualpipe-v, or a CSV file."""
    chunks: Annotated[int, Ge(0)] = 0
    """Stages that each rank of the pipeline holds; 0: what the schedule takes by default."""
    stages: Literal["auto"] | tuple[Positive, ...] = "auto"
    """How many layers each stage has, in the model's order; auto: shared out by computed cost, embedding and head
    counted.
    """
    handover: Literal["auto", "shared", "messages"] = "auto"
    """How the stream passes between stages: within a node in memory that the ranks share, or by messages; auto: by the
    cluster's profile, else shared.
    """
    allreduce: Literal[
        "auto",
        "shared",
        "two-level",
        "ring",
        "segmented-ring",
        "recursive-doubling",
        "rabenseifner",
        "binomial",
        "mpi",
    ] = "auto"
    """Who sums the gradients: the ranks of a node in memory that they share, one of our lists of messages, or the MPI
    library; auto: whichever is fastest by the cluster's profile, or by what was measured elsewhere.
    """
    overlap: Literal["auto", "after", "during"] = "auto"
    """Reduce gradients after the backward pass, or during it; auto: after on one node, during over a
    network.
    """
    bucket_bytes: Annotated[int, Ge(0)] = 0
    """Gradients travel in messages of about this size; 0: 32 MiB after the backward pass, 4 MiB
    during it.
    """
    profile: str = ""
    """The cluster profile that `mpillm bench … --save` wrote; empty: `cluster.json` in the run's folder, if there is
    one.
    """
    debug: bool = False
    """Compare the ranks' collective calls before data moves."""
