"""A modern decoder on one device: token ids in, logits out.

Shapes: B sequences, T positions, C width, V vocabulary.
"""

import torch
import xxhash
from torch import Tensor, nn
from torch.nn import functional as F

from mpillm.models.config import DecoderConfig
from mpillm.models.layers import Layer, LayerCache, Rotary, make_norm

# GPT-2's: weights from a normal distribution of this deviation, the residual outputs' narrower by √(2 · layers).
INITIAL_DEVIATION = 0.02
RESIDUAL_OUTPUTS = ("attention.output.weight", "feed_forward.down.weight")


class Cache:
    """Keys and values of all layers, and how many positions they hold."""

    def __init__(
        self, config: DecoderConfig, batch: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.layers = [LayerCache(config, batch, device, dtype) for _ in range(config.layers)]
        self.length = 0


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.rotary = Rotary(config) if config.positions == "rotary" else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids_BT: Tensor, document_BT: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) of the token that follows each position.

        `document_BT` numbers the document of each position: with it, a position attends only to its own document.
        With a `cache` the ids are the T positions after those that it holds, and it grows by T.
        Raises ValueError when the positions pass the context.
        """
        first = cache.length if cache else 0
        length = ids_BT.shape[1]
        if first + length > self.config.context:
            raise ValueError(f"{first + length} positions pass the context of {self.config.context}")
        x_BTC = self.embedding(ids_BT)
        if self.position is not None:
            x_BTC = x_BTC + self.position.weight[first : first + length]
        mask_TS = _mask(ids_BT, document_BT, first)
        for index, layer in enumerate(self.layers):
            x_BTC = layer(x_BTC, self.rotary, mask_TS, cache.layers[index] if cache else None, first)
        if cache:
            cache.length += length
        logits_BTV: Tensor = self.head(self.norm(x_BTC))
        return logits_BTV


def _mask(ids_BT: Tensor, document_BT: Tensor | None, first: int) -> Tensor | None:
    """True where a position may attend; None where the plain causal mask, or none at all, says it."""
    length = ids_BT.shape[1]
    if document_BT is not None:
        same_BTS = document_BT[:, :, None] == document_BT[:, None, :]
        return same_BTS.tril()[:, None]
    if first and length > 1:
        return torch.ones(length, first + length, dtype=torch.bool, device=ids_BT.device).tril(first)
    return None


def loss_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """The cross-entropy of all positions, summed, in nats (float32)."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum")


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Set each weight as a pure function of (seed, its name, its shape): alike on any rank, device and layout."""
    deviation = INITIAL_DEVIATION / (2 * model.config.layers) ** 0.5
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        elif weight.dim() == 1:
            weight.fill_(1.0)
        else:
            generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(name.encode(), seed=seed) >> 1)
            values = torch.empty(weight.shape, dtype=torch.float32)
            values.normal_(
                0.0, deviation if name.endswith(RESIDUAL_OUTPUTS) else INITIAL_DEVIATION, generator=generator
            )
            weight.copy_(values)


def create(config: DecoderConfig, seed: int, device: torch.device | None = None) -> Decoder:
    """An initialised decoder on `device` (the CPU where none is given)."""
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to_empty(device=device or torch.device("cpu"))
    # Making the memory real undoes what stood in it: the tie, and the table of angles.
    if config.tied:
        model.head.weight = model.embedding.weight
    if model.rotary is not None:
        model.rotary = Rotary(config).to(model.embedding.weight.device)
    initialise(model, seed)
    return model
