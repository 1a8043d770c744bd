"""Classic classifiers on one device: embedding, layers, pooling and head.

Shapes: B sequences, T positions (of an image: side · side), C width, K classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpillm.models.classifiers import ClassifierSettings, CNNConfig
from mpillm.models.layers.dropout import FEED_FORWARD_OUTPUT, drop, layer_keys
from mpillm.models.part_module import Fields, PartModule, PartOutput, Streams
from mpillm.models.spec import Part


class Classifier(PartModule):
    """A classifier, or a part of it. Fields: `ids` (B, T) with `lengths` (B,), or `pixels`
    (B, channels, side, side). Its output: logits (B, K).
    """

    def __init__(self, config: ClassifierSettings, part: Part | None = None) -> None:
        super().__init__(config, part)
        self.config = config
        self.embedding = self.make_embedding() if self.begins else None
        numbers = range(self.part.first, self.part.last)
        self.layers = nn.ModuleDict({str(number): self.make_layer() for number in numbers})
        self.head = nn.Linear(config.width, config.classes) if self.ends else None

    def make_embedding(self) -> nn.Module:
        """Make the embedding of tokens, or of pixels one by one."""
        config = self.config
        if config.image_size:
            return nn.Linear(config.channels, config.width)
        return nn.Embedding(config.vocab_size, config.width)

    def make_layer(self) -> nn.Module:
        raise NotImplementedError

    def apply_layer(self, layer: nn.Module, x_BTC: Tensor) -> Tensor:
        raise NotImplementedError

    def pool(self, x_BTC: Tensor, real_BT1: Tensor) -> Tensor:
        """Return one vector (B, C) of each sequence. `real_BT1`: 1 where no padding is."""
        raise NotImplementedError

    def embed(self, fields: Fields) -> Tensor:
        """Return the embeddings (B, T, C)."""
        assert self.embedding is not None
        if not self.config.image_size:
            x_BTC: Tensor = self.embedding(fields["ids"])
            return x_BTC
        pixels_BTP = fields["pixels"].flatten(2).transpose(1, 2)
        of_pixels_BTC: Tensor = self.embedding(pixels_BTP.to(self._dtype))
        return of_pixels_BTC

    def forward_part(self, fields: Fields, streams: Streams) -> PartOutput:
        pivot_BTC = x_BTC = streams[0] if self.embedding is None else self.embed(fields)
        keys_B = fields.get("dropout_keys")
        for number, layer in self.layers.items():
            x_BTC = self.apply_layer(layer, x_BTC)
            own_B = None if keys_B is None else layer_keys(keys_B, int(number))
            x_BTC = drop(x_BTC, self.config.dropout, own_B, FEED_FORWARD_OUTPUT)
        if self.head is None:
            return PartOutput((x_BTC,), (pivot_BTC,))
        logits_BK = self.head(self.pool(x_BTC, self._real(fields, x_BTC)))
        return PartOutput((logits_BK,), (pivot_BTC,))

    def _real(self, fields: Fields, x_BTC: Tensor) -> Tensor:
        """Return 1 at each position without padding and 0 elsewhere, (B, T, 1)."""
        return real_positions(fields.get("lengths"), x_BTC)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def deviation_of(self, name: str) -> float:
        # He et al. 2015, for ReLU: a layer keeps the variance of what it reads.
        reads = self.config.layer_weights / self.config.width
        return float((2 / reads) ** 0.5) if name.startswith("layers.") else 0.1

    def fill_of(self, name: str) -> float:
        return 0.0


def real_positions(lengths_B: Tensor | None, x_BTC: Tensor) -> Tensor:
    """Return 1 at each position without padding and 0 elsewhere, (B, T, 1)."""
    if lengths_B is None:
        return torch.ones_like(x_BTC[..., :1])
    places_T = torch.arange(x_BTC.shape[1], device=x_BTC.device)
    # A text without tokens has its first position, of padding: a mean of none is NaN.
    lengths_B = lengths_B.to(x_BTC.device).clamp(min=1)
    return (places_T < lengths_B[:, None])[..., None].to(x_BTC.dtype)


class LSTMClassifier(Classifier):
    """LSTM layers, each of one direction."""

    def make_layer(self) -> nn.Module:
        return nn.LSTM(self.config.width, self.config.width, batch_first=True)

    def apply_layer(self, layer: nn.Module, x_BTC: Tensor) -> Tensor:
        y_BTC: Tensor = layer(x_BTC)[0]
        return y_BTC

    def pool(self, x_BTC: Tensor, real_BT1: Tensor) -> Tensor:
        # Padding comes after the last real position, which has not read it.
        last_B11 = real_BT1.long().sum(1, keepdim=True) - 1
        return x_BTC.gather(1, last_B11.expand(-1, -1, x_BTC.shape[2]))[:, 0]

    def deviation_of(self, name: str) -> float:
        # The deviation of torch's own uniform values.
        layer = name.startswith("layers.")
        return float((3 * self.config.width) ** -0.5) if layer else super().deviation_of(name)


class CNNClassifier(Classifier):
    """Convolutions with ReLU."""

    config: CNNConfig

    def make_layer(self) -> nn.Module:
        kind = nn.Conv2d if self.config.image_size else nn.Conv1d
        width = self.config.width
        return kind(width, width, self.config.kernel, padding="same")

    def apply_layer(self, layer: nn.Module, x_BTC: Tensor) -> Tensor:
        x_BCT, side = x_BTC.transpose(1, 2), self.config.image_size
        given = x_BCT.unflatten(2, (side, side)) if side else x_BCT  # type: ignore[no-untyped-call]
        made = F.relu(layer(given))
        # Contiguous, as streams between stages are: products of other strides round otherwise.
        return (made.flatten(2) if side else made).transpose(1, 2).contiguous()

    def pool(self, x_BTC: Tensor, real_BT1: Tensor) -> Tensor:
        return x_BTC.masked_fill(real_BT1 == 0, -torch.inf).amax(1)


class MLPClassifier(Classifier):
    """Linear layers with ReLU over one vector of each sequence."""

    def make_embedding(self) -> nn.Module:
        config = self.config
        pixels = config.channels * config.image_size**2
        return nn.Linear(pixels, config.width) if pixels else super().make_embedding()

    def embed(self, fields: Fields) -> Tensor:
        assert self.embedding is not None
        if self.config.image_size:
            x_B1C: Tensor = self.embedding(fields["pixels"].flatten(1).to(self._dtype))[:, None]
            return x_B1C
        x_BTC = super().embed(fields)
        real_BT1 = real_positions(fields.get("lengths"), x_BTC)
        return (x_BTC * real_BT1).sum(1, keepdim=True) / real_BT1.sum(1, keepdim=True)

    def make_layer(self) -> nn.Module:
        return nn.Linear(self.config.width, self.config.width)

    def apply_layer(self, layer: nn.Module, x_BTC: Tensor) -> Tensor:
        return F.relu(layer(x_BTC))

    def pool(self, x_BTC: Tensor, real_BT1: Tensor) -> Tensor:
        return x_BTC[:, 0]
