"""How the ranks share a training step: the recipe's section [parallel]."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from mpillm.errors import RecipeError
from mpillm.system.plugins import is_plugin

Positive = Annotated[int, Gt(0)]


ALLREDUCE = (
    "auto",
    "shared",
    "two-level",
    "ring",
    "segmented-ring",
    "recursive-doubling",
    "rabenseifner",
    "binomial",
    "mpi",
)


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
    allreduce: str = "auto"
    """Which algorithm sums the gradients: shared memory within a node, one of the lists of messages,
    the MPI library (mpi), or a plug-in `package.module:Name`; auto: the fastest by the cluster's
    profile.
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

    def __post_init__(self) -> None:
        if self.allreduce in ALLREDUCE or is_plugin(self.allreduce):
            return
        near = get_close_matches(self.allreduce, ALLREDUCE, n=1, cutoff=0.5)
        raise RecipeError(
            f"allreduce = {self.allreduce!r} is unknown{f', did you mean {near[0]}?' if near else ''} "
            f"(known: {', '.join(ALLREDUCE)}; your own is named package.module:Name)"
        )
