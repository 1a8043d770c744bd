"""The weights that no step changes: once a node, in memory that its ranks share."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mpillm.comm.mesh import Mesh
from mpillm.comm.shared.segment import share_segment
from mpillm.models.adapt import FrozenWeight, frozen_weights
from mpillm.models.part_module import PartModule, initial_values
from mpillm.parallel import axis_sizes

if TYPE_CHECKING:
    from mpi4py import MPI

# A tensor begins on a cache line of its own.
LINE_BYTES = 64


class FrozenWeights:
    """The frozen weights of a rank's parts, by their names in the whole model.

    Every rank of the mesh makes it, ahead of the weights' first values.
    """

    def __init__(
        self,
        parts: Sequence[PartModule],
        mesh: Mesh,
        dtype: torch.dtype,
        device: torch.device,
        warn: Callable[[str], None],
        alike: bool = False,
    ) -> None:
        """`alike`: all ranks that have parts have the same ones, whatever their places."""
        _join_tied(parts)
        self._held: dict[str, tuple[PartModule, FrozenWeight]] = {}
        for part in parts:
            for name, held in frozen_weights(part).items():
                self._held.setdefault(name, (part, held))
        self._comm: MPI.Intracomm | None = None
        self.fills = True
        """Whether this rank sets the values: the first of those that share them."""
        if not any(mesh.comm.allgather(bool(self._held))):
            return
        for _, held in self._held.values():
            if held.weight is not None and held.weight.dtype != dtype:
                held.weight.data = torch.empty(held.weight.shape, dtype=dtype)
        if device.type == "cpu":
            self._share(mesh, int(bool(self._held)) if alike else _place(mesh), warn)
        else:
            for _, held in self._held.values():
                held.move([torch.empty_like(room, device=device) for room in held.tensors])

    def _share(self, mesh: Mesh, place: int, warn: Callable[[str], None]) -> None:
        """Move the weights into memory of the ranks on this node that hold the same ones: those of
        the same `place`.
        """
        nodes = len(mesh.node_map.nodes)
        color = place * nodes + mesh.node_map.node_of[mesh.comm.rank]
        comm: MPI.Intracomm = mesh.comm.Split(color, mesh.comm.rank)  # type: ignore[assignment]
        tensors = [tensor for _, held in self._held.values() for tensor in held.tensors]
        sizes = [-(-each.nbytes // LINE_BYTES) * LINE_BYTES for each in tensors]
        total = sum(sizes)
        if comm.size == 1 or not total:
            comm.Free()
            return
        found = share_segment(comm, -(-total // comm.size))
        if isinstance(found, str):
            if comm.rank == 0:
                warn(f"{found}; each rank keeps the frozen weights ({total:,} bytes) for itself")
            comm.Free()
            return
        # The rows of the ranks follow each other without a gap: one array.
        whole, first = torch.from_numpy(found.whole), 0
        rooms = []
        for tensor, size in zip(tensors, sizes, strict=True):
            room = whole[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            rooms.append(room)
            first += size
        waiting = iter(rooms)
        for _, held in self._held.values():
            held.move([next(waiting) for _ in held.tensors])
        self._comm, self.fills = comm, comm.rank == 0

    def __contains__(self, weight: object) -> bool:
        return any(held.weight is weight for _, held in self._held.values())

    @property
    def names(self) -> list[str]:
        return list(self._held)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the whole weights, by name."""
        return {
            name: part.pieces[name].shape if name in part.pieces else held.shape
            for name, (part, held) in self._held.items()
        }

    @torch.no_grad()
    def fill(self, name: str, values: Tensor) -> None:
        """Set the weight `name` from the values of the whole weight, where this rank sets them.

        Call `filled` when all are set.
        """
        if not self.fills:
            return
        part, held = self._held[name]
        piece = part.pieces.get(name)
        own = values if piece is None else values[piece.place]
        if held.weight is not None:
            held.weight.data.copy_(own)
        else:
            assert held.stored is not None
            held.stored.fill(own)

    def initialise(self, seed: int) -> None:
        """Set the initial values: those of a run that starts from no other."""
        for name, (part, held) in self._held.items() if self.fills else ():
            if held.weight is not None:
                held.weight.data.copy_(initial_values(part, name, held.shape, seed))

    def plain(self) -> Mapping[str, Tensor]:
        """Return the weights in float32, by name, where this rank sets them.

        They are the weights themselves, or copies: pass changes to `take`.
        """
        found = {}
        for name, (_, held) in self._held.items() if self.fills else ():
            if held.weight is not None:
                found[name] = held.weight.data.float()
        return found

    @torch.no_grad()
    def take(self, name: str, values: Tensor) -> None:
        """Set the weight `name` from what `plain` returned of it."""
        weight = self._held[name][1].weight
        assert weight is not None
        if weight.data_ptr() != values.data_ptr():
            weight.data.copy_(values)

    def filled(self) -> None:
        """Return when the values are there. Every rank of the mesh calls it."""
        if self._comm is not None:
            self._comm.Barrier()

    def close(self) -> None:
        """Free the communicator. Every rank calls it."""
        if self._comm is not None:
            self._comm.Free()


def _place(mesh: Mesh) -> int:
    """Return the number of this rank's place along the axes that cut weights."""
    place = 0
    for axis in axis_sizes.AXES:
        if axis.cuts_weights and axis.name in mesh.sizes:
            place = place * mesh.sizes[axis.name] + mesh.coordinates[axis.name]
    return place


def _join_tied(parts: Sequence[PartModule]) -> None:
    """Let parts of this rank that have both uses of a frozen tied weight hold one Parameter.

    Their gradients need no leaves apart, as those of a trained one do (`pipeline/tying.py`).
    """
    found: dict[str, nn.Parameter] = {}
    for part in parts:
        for own, weight in list(part.named_parameters()):
            if not weight.requires_grad:
                name = part.spec.tied_weights.get(own, own)
                part.set_weight(own, found.setdefault(name, weight))
