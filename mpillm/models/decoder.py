"""A modern decoder on one device: token ids in, logits out; or a run of its layers, which hands the stream on.

Shapes: B sequences, T positions, C width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mpillm.models.config import DecoderConfig
from mpillm.models.layers import Layer, LayerCache, Rotary, make_norm

# GPT-2's: weights from a normal distribution of this deviation, the residual outputs' narrower by √(2 · layers).
INITIAL_DEVIATION = 0.02
RESIDUAL_OUTPUTS = ("attention.output.weight", "feed_forward.down.weight")


class Cache:
    """Keys and values of all layers, and how many positions they hold."""

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layers = [LayerCache(config, batch, device, dtype) for _ in range(config.layers)]
        self.length = 0


@dataclass(frozen=True)
class Part:
    """Layers `first` to `last` − 1. The embedding stands before the model's first layer, norm and head behind its
    last.
    """

    first: int
    last: int


class Decoder(nn.Module):
    """The whole model, or the `part` of it: the names of weights are the whole model's."""

    def __init__(self, config: DecoderConfig, part: Part | None = None) -> None:
        super().__init__()
        part = part or Part(0, config.layers)
        self.config = config
        self.begins, self.ends = part.first == 0, part.last == config.layers
        learned = self.begins and config.positions == "learned"
        self.embedding = nn.Embedding(config.vocab_size, config.width) if self.begins else None
        self.position = nn.Embedding(config.context, config.width) if learned else None
        self.rotary = Rotary(config) if config.positions == "rotary" else None
        self.layers = nn.ModuleDict(
            {str(index): Layer(config) for index in range(part.first, part.last)}
        )
        self.norm = make_norm(config) if self.ends else None
        self.head = nn.Linear(config.width, config.vocab_size, bias=False) if self.ends else None
        self.tie()

    def tie(self) -> None:
        """Let the head be the embedding, where the model wants it and has both."""
        if self.config.tied and self.head is not None and self.embedding is not None:
            self.head.weight = self.embedding.weight

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights by their names in the whole model, where a tied head bears the embedding's."""
        for name, weight in self.named_parameters():
            yield (
                ("embedding.weight" if self.config.tied and name == "head.weight" else name),
                weight,
            )

    def forward(
        self, given: Tensor, document_BT: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits (B, T, V) of the token that follows each position of `given`, the token ids (B, T).

        A part that does not begin the model is given the stream (B, T, C) of the part before; one that does not end it
        returns the stream.

        `document_BT` numbers the document of each position: with it, a position attends only to its own document.
        With a `cache` the T positions are those after what it holds, and it grows by T.
        Raises ValueError when the positions pass the context.
        """
        first = cache.length if cache else 0
        length = given.shape[1]
        if first + length > self.config.context:
            raise ValueError(
                f"{first + length} positions pass the context of {self.config.context}"
            )
        x_BTC = given if self.embedding is None else self.embedding(given)
        if self.position is not None:
            x_BTC = x_BTC + self.position.weight[first : first + length]
        mask_TS = _mask(length, document_BT, first, given.device)
        for index, layer in self.layers.items():
            x_BTC = layer(
                x_BTC, self.rotary, mask_TS, cache.layers[int(index)] if cache else None, first
            )
        if cache and self.ends:
            cache.length += length
        if self.norm is not None and self.head is not None:
            return self.head(self.norm(x_BTC))  # type: ignore[no-any-return]
        return x_BTC


def _mask(
    length: int, document_BT: Tensor | None, first: int, device: torch.device
) -> Tensor | None:
    """True where a position may attend; None where the plain causal mask, or none at all, says it."""
    if document_BT is not None:
        same_BTS = document_BT[:, :, None] == document_BT[:, None, :]
        return same_BTS.tril()[:, None]
    if first and length > 1:
        return torch.ones(length, first + length, dtype=torch.bool, device=device).tril(first)
    return None


def loss_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """The cross-entropy of all positions, summed, in nats (float32)."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum")


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Set each weight as a pure function of (seed, its name, its shape): alike on any rank, device and layout."""
    deviation = INITIAL_DEVIATION / (2 * model.config.layers) ** 0.5
    for name, weight in model.named_weights():
        if name.endswith("bias"):
            weight.zero_()
        elif weight.dim() == 1:
            weight.fill_(1.0)
        else:
            generator = torch.Generator().manual_seed(
                xxhash.xxh3_64_intdigest(name.encode(), seed=seed) >> 1
            )
            values = torch.empty(weight.shape, dtype=torch.float32)
            values.normal_(
                0.0,
                deviation if name.endswith(RESIDUAL_OUTPUTS) else INITIAL_DEVIATION,
                generator=generator,
            )
            weight.copy_(values)


class WithoutValues(TorchFunctionMode):
    """Inside it modules are made with memory and no values, for whoever sets them all: weights are drawn once.

    On the meta device they would have no memory, and torch loads its compiler there, which takes as long as torch.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return (
            None
            if getattr(func, "__module__", "") == nn.init.__name__
            else func(*args, **(kwargs or {}))
        )


def create(
    config: DecoderConfig, seed: int, device: torch.device | None = None, part: Part | None = None
) -> Decoder:
    """An initialised decoder, or the `part` of it, on `device` (the CPU where none is given)."""
    with device or torch.device("cpu"), WithoutValues():
        model = Decoder(config, part)
    initialise(model, seed)
    return model
