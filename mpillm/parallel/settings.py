"""Settings of the recipe's section [parallel]."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from mpillm.comm.algorithms.algorithm_catalog import algorithms_of
from mpillm.errors import RecipeError
from mpillm.system.plugins import is_plugin

Positive = Annotated[int, Gt(0)]


def allreduce_names() -> tuple[str, ...]:
    """List what may sum gradients: algorithms, shared memory, and the MPI library."""
    others = ("auto", "shared", "two-level", "segmented-ring", "mpi")
    return (*others, *algorithms_of("allreduce"))


@dataclass(frozen=True)
class ParallelSettings:
    """How the ranks share a training step. A key has the name of its mesh axis."""

    data: Literal["auto"] | Annotated[int, Ge(0)] = "auto"
    """Ranks that share the batch; auto, or 0: as many as the other axes leave."""
    context: Annotated[int, Gt(0)] = 1
    """Ranks that share the positions of each sequence."""
    context_kind: Literal["auto", "ring", "ulysses"] = "auto"
    """How these ranks attend: keys and values go round in a ring, or heads are exchanged.

    auto: whichever moves fewer bytes; heads where the ranks divide them.
    """
    pipeline: Annotated[int, Gt(0)] = 1
    """Ranks that share the layers."""
    tensor: Annotated[int, Gt(0)] = 1
    """Ranks that share the heads, hidden features and vocabulary of each layer."""
    island: Annotated[int, Gt(0)] = 1
    """Groups of ranks that train alone and average their weights once a round, for slow networks.
    """
    island_every: Annotated[int, Gt(0)] = 30
    """Steps of a round."""
    island_from: Annotated[int, Ge(0)] = 0
    """Steps that all islands compute together, as one data axis, before the first round."""
    island_rate: Annotated[float, Gt(0), Le(2)] = 1.0
    """The learning rate of the step on the islands' mean difference."""
    island_momentum: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Nesterov's momentum of that step."""
    island_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the differences in messages."""
    experts: Annotated[int, Gt(0)] = 1
    """Ranks that share out the experts of each mixture; they are among those that share the tokens
    of a batch.
    """
    schedule: str = "1f1b"
    """The order of passes in the pipeline: gpipe, 1f1b, interleaved, zb-h1, zb-v, dualpipe-v,
    a CSV file, or a plug-in as `package.module:Name`.
    """
    chunks: Annotated[int, Ge(0)] = 0
    """Stages that each rank of the pipeline holds; 0: the schedule's default."""
    stages: Literal["auto"] | tuple[Positive, ...] = "auto"
    """Layers of each stage, in the model's order; auto: by their FLOPs and those of the ends."""
    zero: Literal[0, 1, 2, 3] = 0
    """What the ranks of the data axis share out (ZeRO): 0: nothing; 1: the optimizer's states;
    2: the gradients, too; 3: the weights, too, which a node then has once, or, where its ranks
    share no memory, are gathered layer by layer.
    """
    zero_on_node: bool = False
    """Share out within each node alone, with equal shards on all nodes (hybrid sharding)."""
    handover: Literal["auto", "shared", "messages"] = "auto"
    """How streams pass between stages: through shared memory within a node, or by messages.

    auto: by the cluster's profile, else shared.
    """
    allreduce: str = "auto"
    """The all-reduce of gradients: shared memory within a node, one of the lists of messages, the
    MPI library (mpi), or a plug-in `package.module:Name`. auto: the fastest by the cluster's
    profile, else by the built-in table. With `zero` it is always that.
    """
    overlap: Literal["auto", "after", "during"] = "auto"
    """Reduce gradients after the backward pass, or overlapped with it (during); not with `zero`.

    auto: after it on one node, during it over a network.
    """
    bucket_bytes: Annotated[int, Ge(0)] = 0
    """Target size of a gradient bucket, in bytes.

    0: 32 MiB after the backward pass, 4 MiB during it; 8 MiB with `zero`.
    """
    profile: str = ""
    """The cluster profile that `mpillm bench … --save` wrote.

    Empty: `cluster.json` in the run's folder, if it exists.
    """
    debug: bool = False
    """Compare the ranks' collective calls before data moves."""

    def __post_init__(self) -> None:
        known = allreduce_names()
        if self.allreduce in known or is_plugin(self.allreduce):
            return
        near = get_close_matches(self.allreduce, known, n=1, cutoff=0.5)
        hint = f", did you mean {near[0]}?" if near else ""
        raise RecipeError(
            f"allreduce = {self.allreduce!r} is unknown{hint} (known: {', '.join(known)}; "
            "your own is named package.module:Name)"
        )
