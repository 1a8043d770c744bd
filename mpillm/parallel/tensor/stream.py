"""The stream between the cut products: gathered ahead of them, summed and shared out after them.

These are functions of autograd, each the other's backward pass: an all-gather and a reduce-scatter
(Korthikanti et al. 2022, section 4.2).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from mpillm.comm.communicator import Communicator, silent
from mpillm.comm.mesh import Axis
from mpillm.parallel.exchanged import Exchange, exchanged
from mpillm.parallel.tensor.message_streams import MessageStreams
from mpillm.parallel.tensor.shared_streams import SharedStreams
from mpillm.parallel.tensor.stream_split import StreamSplit, choose_split

if TYPE_CHECKING:
    from mpi4py import MPI


class TensorStream:
    """The stream of the ranks of `axis`, which call all methods together, in one order.

    `enter` comes ahead of each pass of a microbatch: it sets how the stream is shared out.
    """

    def __init__(
        self, axis: Axis, group: Communicator, warn: Callable[[str], None] = silent
    ) -> None:
        """`group`: of the ranks of `axis`."""
        self.size, self.rank = axis.size, axis.rank
        self.split = choose_split(0, 0, axis.size)
        self.sent_bytes = 0
        """What this rank has given to others so far."""
        self._comm: MPI.Intracomm = group.comm
        self._group, self._warn = group, warn
        self._messages = MessageStreams(group)
        self._barrier = group.prepare("barrier").bare
        self._shares = group.node_map.shares_memory and group.node_map.on_one_node
        self._shared: dict[int, SharedStreams | None] = {}
        self._room = 0
        self._warned = False

    @property
    def is_shared(self) -> bool:
        """Whether the last stream was entered with room for it in node-shared memory."""
        return self._shared.get(self._room) is not None

    def enter(self, rows: int, length: int, room: int = 0) -> None:
        """Begin a pass of `rows` sequences of `length` tokens.

        `room`: the bytes of the largest stream of its kind of pass, for which shared memory is
        mapped at the first; 0: none, as where streams are not in host memory.
        """
        self.split, self._room = choose_split(rows, length, self.size), room
        if room and room not in self._shared:
            self._shared[room] = self._share(room) if self._shares else None

    def _share(self, nbytes: int) -> SharedStreams | None:
        made = SharedStreams.create(self._comm, nbytes, self._barrier)
        if isinstance(made, str):
            self._say(f"{made}; the ranks of the tensor axis send messages, which is slower")
            return None
        return made

    def _say(self, text: str) -> None:
        if self.rank == 0:
            self._warn(text)

    def _shared_for(self, tensor: Tensor) -> SharedStreams | None:
        """Return the shared memory for a stream like `tensor`, a part or the whole."""
        shared = self._shared.get(self._room)
        whole = self.split.rows * self.split.length * tensor.shape[-1] * tensor.element_size()
        return shared if shared is not None and whole <= shared.nbytes else None

    def gather(self, own: Tensor, split: StreamSplit) -> Tensor:
        """Return the whole stream (B, T, C) of the ranks' parts, without a gradient."""
        self.sent_bytes += own.nbytes * (self.size - 1)
        shared = self._shared_for(own)
        whole = None if shared is None else shared.gather(own, split)
        if whole is not None:
            return whole
        if shared is not None and not self._warned:
            self._warned, held = True, len(shared.slots)
            self._say(
                f"{shared.slots.fault} (held: {held:,} × {shared.nbytes:,} bytes); the ranks of "
                "the tensor axis send further streams as messages, which is slower"
            )
        return self._messages.gather(own, split)

    def reduce(self, partial: Tensor, split: StreamSplit) -> Tensor:
        """Return the own part of the sum over the ranks of `partial` (B, T, C), without a
        gradient.
        """
        rows, length = split.shape(self.rank)
        kept = rows * length * partial.shape[-1] * partial.element_size()
        self.sent_bytes += partial.nbytes - kept
        shared = self._shared_for(partial)
        if shared is not None:
            return shared.reduce(partial, split)
        return self._messages.reduce(partial, split)

    def own(self, whole: Tensor) -> Tensor:
        """Return the own part of a tensor (B, T, …)."""
        split = self.split
        return whole.narrow(split.dim, split.first(self.rank), split.count(self.rank))

    def padded(self, own: Tensor) -> Tensor:
        """Return a tensor (B, T, C) with `own` in its place and zeros elsewhere.

        A model's ends then see the whole shape, and gradients reach the own part alone.
        """
        split, rank = self.split, self.rank
        ahead, after = split.first(rank), split.bounds[-1] - split.bounds[rank + 1]
        sides = (0, 0, ahead, after)
        return F.pad(own, sides if split.dim else (0, 0, *sides))

    def gathered(self, own: Tensor) -> Tensor:
        """Return the whole stream (B, T, C); its gradients are summed over the ranks."""
        there, back = self._exchanges()
        return exchanged(own, there, back)

    def reduced(self, partial: Tensor) -> Tensor:
        """Return the own part of the sum of `partial` (B, T, C) over the ranks."""
        there, back = self._exchanges()
        return exchanged(partial, back, there)

    def _exchanges(self) -> tuple[Exchange, Exchange]:
        """Return the all-gather and the reduce-scatter of the microbatch that was entered."""
        # A backward pass may come after the forward pass of a microbatch of another shape.
        split = self.split
        return (lambda own: self.gather(own, split)), (lambda partial: self.reduce(partial, split))

    def all_keys(self, keys_B: Tensor) -> Tensor:
        """Return the dropout keys of all rows, from those of the own ones."""
        split = self.split
        if split.dim:
            return keys_B
        # Rows are dealt out where the ranks divide them: each has as many.
        every = keys_B.new_empty((self.size, len(keys_B)))
        self._group.allgather(keys_B.contiguous(), every)
        return every.flatten()

    def close(self) -> None:
        """Drop shared memory and prepared messages: parts refer to the stream, and are freed
        later. Every rank calls it ahead of the end of `group`.
        """
        self._shared.clear()
        self._messages.close()
