"""Compare what the fullest host of a layout needs with the memory of a host: without torch and MPI.

The figures are those of `rank_loads`: a run refuses by them what its dry run prints.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mpillm.models.spec import ModelSpec
from mpillm.plan.held_memory import FLOAT32_BYTES
from mpillm.plan.peak_memory import TOKEN_BYTES
from mpillm.plan.rank_loads import NodeLoad, RankLoad, load_nodes
from mpillm.system.console import binary_bytes, counted, table_text

TITLE = "peak memory"


@dataclass(frozen=True)
class MemoryTable:
    """The peak by kind of memory, of the rank and of the host that hold most."""

    loads: Sequence[RankLoad]
    nodes: Sequence[NodeLoad]
    device: str

    @classmethod
    def of(cls, loads: Sequence[RankLoad], device: str) -> "MemoryTable":
        """Add up the loads of each host; `device`: that the ranks compute on."""
        return cls(loads, load_nodes(loads), device)

    @property
    def fullest(self) -> int:
        """The number of the host that holds most, from 0."""
        return max(range(len(self.nodes)), key=lambda node: self.nodes[node].total)

    @property
    def columns(self) -> list[str]:
        """The heads of `rows`."""
        host = "its host" if len(self.nodes) == 1 else "largest host"
        where = "" if self.device == "cpu" else " (GPUs)"
        return ["kind", f"rank {self._most.rank}", host + where]

    @property
    def rows(self) -> list[list[str]]:
        """Each kind of memory with its bytes in the rank and on the host, and their sums."""
        most, fullest = self._most, self.nodes[self.fullest]
        return [
            ["parameters", f"{most.parameters:,}", f"{fullest.parameters:,}"],
            *(
                [kind, binary_bytes(nbytes.rank), binary_bytes(fullest.kinds[kind])]
                for kind, nbytes in most.memory.by_kind.items()
                if nbytes.rank
            ),
            ["total", binary_bytes(most.memory.total), binary_bytes(fullest.total)],
        ]

    @property
    def _most(self) -> RankLoad:
        return max(self.loads, key=lambda load: load.memory.total)

    def shortest(self, memory: Sequence[int]) -> int | None:
        """Return the number of the host that lacks most bytes; None where each has enough.

        `memory`: what the job may use of each host, in bytes; 0: unknown. GPUs hold what ranks on
        them need, so nothing is compared.
        """
        if self.device != "cpu":
            return None
        each = enumerate(zip(self.nodes, memory, strict=True))
        lacks = {number: node.total - there for number, (node, there) in each if there}
        most = max(lacks, key=lambda number: lacks[number], default=0)
        return most if lacks.get(most, 0) > 0 else None

    def excess(self, memory: Sequence[int]) -> str:
        """Say that a host needs more than its `memory`, see `shortest`; "" where none does."""
        host = self.shortest(memory)
        if host is None:
            return ""
        ranks = sum(load.node == host for load in self.loads)
        return (
            f"{counted(ranks, 'rank')} of a host may need {binary_bytes(self.nodes[host].total)}, "
            f"and it has {binary_bytes(memory[host])}"
        )

    def text(self) -> str:
        """Write the table as lines."""
        return table_text(TITLE, self.columns, self.rows)


def beyond_all_hosts(
    model: ModelSpec, batch: int, memory: Sequence[int], hosts_compute: bool = True
) -> str:
    """Say why no layout can hold the model, or the ids of a batch; "" where one may.

    The bound needs no plan, for a plan of 10¹⁸ layers has no end. Over all hosts each parameter is
    in float32 once, as weight or as master. So is each id of a batch of `batch` sequences.
    `memory`: of each host, in bytes; 0: unknown. Without `hosts_compute` GPUs hold the model.
    """
    there = sum(memory) if all(memory) else 0
    own = f"the memory of {counted(len(memory), 'host')} is {binary_bytes(there)}"
    weights = FLOAT32_BYTES * model.parameters
    if there and hosts_compute and weights > there:
        return (
            f"the model has {model.parameters:,} parameters, whose weights alone need "
            f"{binary_bytes(weights)}, and {own}; use a smaller "
            f"model (vocabulary {model.vocab_size:,}, {model.blocks:,} layers), or more hosts"
        )
    ids = TOKEN_BYTES * batch * model.context
    if there and ids > there:
        return (
            f"train.batch = {batch:,} sequences of {model.context:,} tokens are "
            f"{binary_bytes(ids)} of ids alone, and {own}; use a smaller batch"
        )
    return ""
