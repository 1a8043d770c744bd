"""Two toy architectures that read the fields of all tasks: an encoder, and an encoder–decoder.

They mix positions by means over the real ones, so that a wrong length changes the loss.
"""

from dataclasses import dataclass
from typing import ClassVar

from mpillm.models.spec import ModelSpec, Part


@dataclass(frozen=True)
class ToySpec(ModelSpec):
    depth: int = 2
    width: int = 16
    context: int = 32
    vocab_size: int = 0

    def describe(self) -> str:
        return "a toy"

    @property
    def blocks(self) -> int:
        return self.depth

    @property
    def stream_widths(self) -> tuple[int, ...]:
        return (self.width,)

    @property
    def block_flops(self) -> tuple[float, ...]:
        return (6.0 * self.width**2,) * self.depth

    @property
    def end_flops(self) -> tuple[float, float]:
        return 0.0, 0.0

    def parameters_of(self, part: Part) -> int:
        return part.count * (self.width + 1) * self.width + 2 * self.vocab_size * self.width

    def activation_bytes(self, part: Part, rows: int, element_bytes: int = 4) -> int:
        return rows * self.context * part.count * self.width * element_bytes

    def output_bytes(self, rows: int, device: str = "cpu") -> int:
        return rows * self.context * 8 * self.vocab_size


@dataclass(frozen=True)
class ToyEncoder(ToySpec):
    host_inputs: ClassVar[tuple[str, ...]] = ("lengths",)

    architecture: str = "tests.train.task_models:ToyEncoder"
    classes: int = 0
    per_token: bool = False
    """Classes of each position, not of the sequence."""
    features: int = 0
    """Numbers of a frame, or of a picture."""

    def build(self, part: Part | None = None):
        return _encoder()(self, part)


@dataclass(frozen=True)
class ToyTranslator(ToySpec):
    architecture: str = "tests.train.task_models:ToyTranslator"
    longest_source: int = 48
    features: int = 0

    @property
    def source_context(self) -> int:
        return self.longest_source

    def build(self, part: Part | None = None):
        return _translator()(self, part)


def _halved(frames_BFM):
    """Take two frames as one position, as convolutions of sound do."""
    return frames_BFM.unflatten(1, (-1, 2)).mean(2)


def _mean(x_BTC, lengths_B):
    import torch

    if lengths_B is None:
        return x_BTC.mean(1, keepdim=True)
    real_BT1 = (torch.arange(x_BTC.shape[1]) < lengths_B[:, None])[..., None]
    return (x_BTC * real_BT1).sum(1, keepdim=True) / lengths_B[:, None, None]


def _encoder():
    import torch
    from torch import nn

    from mpillm.models.part_module import PartModule, PartOutput

    class EncoderPart(PartModule):
        def __init__(self, spec: ToyEncoder, part: Part | None) -> None:
            super().__init__(spec, part)
            first = nn.Linear(spec.features, spec.width) if spec.features else None
            table = first or nn.Embedding(max(spec.vocab_size, 1), spec.width)
            self.first = table if self.begins else None
            numbers = range(self.part.first, self.part.last)
            self.mix = nn.ModuleDict({str(n): nn.Linear(spec.width, spec.width) for n in numbers})
            outputs = spec.classes or spec.vocab_size
            self.head = nn.Linear(spec.width, outputs) if self.ends else None

        def forward_part(self, fields, streams):
            if self.first is None:
                (x,), pivots = streams, streams
            else:
                x = self.first(_inputs(fields))
                pivots = (x,)
            lengths = fields.get("lengths")
            for mix in self.mix.values():
                shifted = nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
                x = x + mix(shifted + x + _mean(x, lengths)).tanh()
            if self.head is None:
                return PartOutput((x,), pivots)
            if self.spec.classes and not self.spec.per_token:
                x = _mean(x, lengths)[:, 0]
            return PartOutput((self.head(x),), pivots)

    def _inputs(fields):
        if "pixels" in fields:
            return fields["pixels"].flatten(1)[:, None].float()
        return _halved(fields["frames"]) if "frames" in fields else fields["ids"]

    del torch
    return EncoderPart


def _translator():
    from torch import nn

    from mpillm.models.part_module import PartModule, PartOutput

    class TranslatorPart(PartModule):
        def __init__(self, spec: ToyTranslator, part: Part | None) -> None:
            super().__init__(spec, part)
            first = nn.Linear(spec.features, spec.width) if spec.features else None
            table = first or nn.Embedding(spec.vocab_size, spec.width)
            self.source = table if self.begins else None
            self.target = nn.Embedding(spec.vocab_size, spec.width) if self.begins else None
            numbers = range(self.part.first, self.part.last)
            self.mix = nn.ModuleDict({str(n): nn.Linear(spec.width, spec.width) for n in numbers})
            self.head = nn.Linear(spec.width, spec.vocab_size) if self.ends else None

        def forward_part(self, fields, streams):
            if self.source is None:
                (x,), pivots = streams, streams
            else:
                given = _halved(fields["frames"]) if "frames" in fields else fields["source"]
                memory = _mean(self.source(given), fields.get("source_lengths"))
                x = self.target(fields["ids"]) + memory
                pivots = (x,)
            for mix in self.mix.values():
                x = x + mix(x.cumsum(1) / 8).tanh()
            return PartOutput((x if self.head is None else self.head(x),), pivots)

    return TranslatorPart
