"""The ranks that share out the weights of an axis: sums to the owners, and values back from them.

On several nodes sums are made within each node, then between the ranks of equal local rank. So each
byte crosses the network once a node. Shards are numbered for that: local rank first, then node.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mpillm.comm.communicator import Communicator, silent
from mpillm.comm.mesh import Axis
from mpillm.comm.persistent import PersistentCollective
from mpillm.comm.selection import Profile
from mpillm.machine.node_map import NodeMap, map_nodes

Action = Callable[[], None]


class ShardGroup:
    """The ranks of `axis`, each the owner of a shard. Every rank of the axis makes it.

    `on_node`: shards are those of one node, and the nodes have equal ones (hybrid sharding, Zhao et
    al., "PyTorch FSDP", VLDB 2023, section 3.2.2).
    """

    def __init__(
        self,
        axis: Axis,
        profile: Profile | None = None,
        debug: bool = False,
        warn: Callable[[str], None] = silent,
        on_node: bool = False,
        alike: bool = True,
    ) -> None:
        """`alike`: whether all axes of the mesh that are parallel to this one have their ranks on
        nodes in the same way. Else shards are numbered by rank: ranks of several such axes that
        exchange what they own must own the same.
        """
        self.axis = axis
        self.node_map = node_map = axis.node_map or map_nodes(axis.comm)
        each = len(node_map.nodes[0]) if node_map.even and alike else 1
        self._nodes = axis.size // each
        self._on_node = on_node and each > 1
        if on_node and each == 1 and axis.rank == 0:
            warn(
                "parallel.zero_on_node = true needs several ranks of the data axis on each host, "
                "equally many; all ranks of the axis share out instead"
            )
        local = node_map.local_rank(axis.rank) if each > 1 else 0
        self._node = node_map.node_of[axis.rank] if each > 1 else axis.rank
        self.shards = each if self._on_node else axis.size
        self.shard = local if self._on_node else local * self._nodes + self._node
        self._options = {"profile": profile, "debug": debug, "warn": warn}
        self.shard_of_rank: list[int] = axis.comm.allgather(self.shard)
        self.within = self._join(self._node, local, node_map) if each > 1 else None
        self._across = self._join(local, self._node, node_map) if self._nodes > 1 else None
        keeps_order = node_map.keeps_order or self._nodes == 1 or each == 1
        # The order of ranks, where two levels would not keep it.
        self._all = None if keeps_order else self._join(0, axis.rank, node_map)

    def _join(self, color: int, key: int, node_map: NodeMap) -> Communicator:
        comm = self.axis.comm.Split(color, key)
        # A rank's place on the axis, in the order of `comm`.
        ranks = comm.allgather(self.axis.rank)
        group = Communicator(comm, node_map=node_map.of_ranks(ranks), **self._options)  # type: ignore[arg-type]
        # The Communicator has a duplicate of its own.
        comm.Free()
        return group

    @property
    def replica(self) -> tuple[int, int]:
        """(i, n): this shard is the i-th of n equal ones, on as many nodes."""
        return (self._node, self._nodes) if self._on_node else (0, 1)

    @property
    def ways(self) -> str:
        """Say how many shards there are, and on how many nodes."""
        nodes = f", equal on {self._nodes} nodes" if self._on_node and self._nodes > 1 else ""
        return f"{self.shards} shards{nodes}"

    def allocate(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a row of zeros for `prepare_sum`, in node-shared memory where that is possible.

        Every rank of the axis calls it.
        """
        if self.within is not None and device.type == "cpu":
            rows = self.within.allocate(count, str(dtype).removeprefix("torch."))
            if rows is not None:
                return torch.from_numpy(rows.own).view(dtype)
        return torch.zeros(count, dtype=dtype, device=device)

    def prepare_sum(self, row: Tensor, out: Tensor, fixed_order: bool = False) -> Action:
        """Prepare: sum `row`, a block a shard, over all ranks, and leave the own block in `out`.

        Every rank prepares the same, in the same order. `fixed_order`: in the one tree over the
        ranks of the axis.
        """
        count = out.numel()
        if fixed_order and self._all is not None:
            whole = self._all.prepare("allreduce", row, fixed_order=True)
            own = row[self.shard * count : (self.shard + 1) * count]
            return _in_turn(whole.run, lambda: out.copy_(own))
        if self._on_node or self._across is None:
            assert self.within is not None
            first = self.within.prepare("reduce_scatter", row, out, fixed_order=fixed_order)
            if self._across is None:
                return first.run
            return _in_turn(
                first.run, self._across.prepare("allreduce", out, fixed_order=fixed_order).run
            )
        if self.within is None:
            return self._across.prepare("reduce_scatter", row, out, fixed_order=fixed_order).run
        region = torch.empty(self._nodes * count, dtype=row.dtype, device=row.device)
        within = self.within.prepare("reduce_scatter", row, region, fixed_order=fixed_order)
        across = self._across.prepare("reduce_scatter", region, out, fixed_order=fixed_order)
        return _in_turn(within.run, across.run)

    def prepare_gather(
        self, row: Tensor, once_a_node: bool
    ) -> tuple[list[PersistentCollective], list[int]]:
        """Prepare: fill the blocks of `row` from the shards that own them, by calls that run in
        turn; return which arrive, too.

        `once_a_node`: the ranks of a node share the weights. Each then takes blocks of other nodes
        alone, those of ranks of its own local rank. Every rank prepares the same, in the same
        order.
        """
        calls: list[PersistentCollective] = []
        arriving: list[int] = []
        if self._across is not None and not self._on_node:
            count = row.numel() // self.shards
            first = self.shard - self._node
            region = row[first * count : (first + self._nodes) * count]
            calls.append(self._across.prepare("allgather", region))
            arriving += range(first, first + self._nodes)
        if self.within is not None and not once_a_node:
            calls.append(self.within.prepare("allgather", row))
            arriving = list(range(self.shards))
        return calls, [shard for shard in arriving if shard != self.shard]

    def barrier(self) -> None:
        """Return when all ranks of the node have called it."""
        if self.within is not None:
            self.within.barrier()

    def free(self) -> None:
        """Free the communicators. Every rank of the axis calls it."""
        for group in (self._all, self._across, self.within):
            if group is not None:
                group.free()


def _in_turn(*steps: Callable[[], object]) -> Action:
    def run() -> None:
        for step in steps:
            step()

    return run
