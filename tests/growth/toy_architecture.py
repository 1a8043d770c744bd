"""A toy architecture that is not a decoder: two streams of unequal width pass from block to block.

One stream carries the tokens' features, the other a running memory of them. Each block mixes both.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from mpillm.models.spec import ModelSpec, Part

Positive = Annotated[int, Gt(0)]


@dataclass(frozen=True)
class TwoStreams(ModelSpec):
    # Every part reads the token ids, those in the middle of a pipeline too.
    shared_inputs: ClassVar[tuple[str, ...]] = ("ids",)

    architecture: str = "growth.toy_architecture:TwoStreams"
    depth: Positive = 4
    width: Positive = 16
    memory: Positive = 8
    context: Positive = 32
    vocab_size: int = 0

    def build(self, part: Part | None = None):
        return _module_class()(self, part)

    def describe(self) -> str:
        return f"{self.depth} blocks of two streams, {self.width} and {self.memory} wide"

    @property
    def blocks(self) -> int:
        return self.depth

    @property
    def tied_weights(self) -> dict[str, str]:
        """Two followers of one leader, as the embeddings of an encoder–decoder."""
        return {"head.weight": "embedding.weight", "again.weight": "embedding.weight"}

    @property
    def stream_widths(self) -> tuple[int, ...]:
        return self.width, self.memory

    @property
    def block_flops(self) -> tuple[float, ...]:
        return (6.0 * (self.width + self.memory) ** 2,) * self.depth

    @property
    def end_flops(self) -> tuple[float, float]:
        return 0.0, 6.0 * self.width * self.vocab_size

    def parameters_of(self, part: Part) -> int:
        both = self.width + self.memory
        ends = self.begins(part) or self.ends(part)
        return part.count * (both * both + both) + ends * self.vocab_size * self.width

    def activation_bytes(self, part: Part, rows: int, element_bytes: int = 4) -> int:
        return rows * self.context * part.count * 2 * (self.width + self.memory) * element_bytes

    def output_bytes(self, rows: int, device: str = "cpu") -> int:
        return rows * self.context * 8 * self.vocab_size


def _module_class():
    import torch
    from torch import nn

    from mpillm.models.part_module import PartModule, PartOutput

    class TwoStreamsPart(PartModule):
        def __init__(self, spec: TwoStreams, part: Part | None) -> None:
            super().__init__(spec, part)
            both = spec.width + spec.memory
            self.embedding = nn.Embedding(spec.vocab_size, spec.width) if self.begins else None
            numbers = range(self.part.first, self.part.last)
            self.mix = nn.ModuleDict({str(number): nn.Linear(both, both) for number in numbers})
            self.head = nn.Linear(spec.width, spec.vocab_size, bias=False) if self.ends else None
            self.again = nn.Embedding(spec.vocab_size, spec.width) if self.ends else None
            self.tie()

        def forward_part(self, fields, streams):
            if self.embedding is None:
                x, memory = streams
                pivots = streams
            else:
                x = self.embedding(fields["ids"])
                memory = x.cumsum(1)[..., : self.spec.memory] / self.spec.context
                pivots = (x,)
            odd = 0.1 * (fields["ids"] % 2)[..., None]
            for mix in self.mix.values():
                mixed = mix(torch.cat([x, memory + odd], -1)).tanh()
                x, memory = (
                    x + mixed[..., : self.spec.width],
                    memory + mixed[..., self.spec.width :],
                )
            if self.head is None:
                return PartOutput((x, memory), pivots)
            x = x + self.again(fields["ids"])
            return PartOutput((self.head(x) + memory.mean(-1, keepdim=True),), pivots)

    return TwoStreamsPart
