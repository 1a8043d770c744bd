"""The layers that replace those of a model where a rank holds a part of their weights.

Shapes: B sequences, T positions, C width, K heads of keys and values, D width of a head. `own`
tensors have the rank's part of the tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpillm.models.layers.adapted_linear import AdaptedLinear
from mpillm.parallel.tensor.stream import TensorStream


class RowLinear(nn.Module):
    """A product whose rows are cut: each rank's features give a share of each output.

    The bias is added to the own tokens, after the shares are summed.
    """

    def __init__(self, linear: nn.Linear | AdaptedLinear, stream: TensorStream) -> None:
        """Take the weights of `linear`, cut already."""
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.adapter = getattr(linear, "adapter", None)
        self._stream = stream

    def forward(self, x_BTF: Tensor) -> Tensor:
        """Return the own tokens' outputs, of the rank's features `x_BTF` of all tokens."""
        share_BTC = F.linear(x_BTF, self.weight)
        if self.adapter is not None:
            share_BTC = share_BTC + self.adapter(x_BTF)
        own_BTC = self._stream.reduced(share_BTC)
        return own_BTC if self.bias is None else own_BTC + self.bias


class HeadsLinear(nn.Module):
    """A product that computes some heads of a whole weight: of keys and values that the ranks do
    not divide.
    """

    def __init__(
        self, linear: nn.Linear | AdaptedLinear, heads: Sequence[int], head_features: int
    ) -> None:
        """`heads`: which, in order; a head may be named several times."""
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.adapter = getattr(linear, "adapter", None)
        features = torch.arange(head_features)
        rows = (torch.tensor(heads)[:, None] * head_features + features).flatten()
        self.rows: Tensor
        self.register_buffer("rows", rows.to(linear.weight.device), persistent=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[self.rows]
        y_BTF = F.linear(x_BTC, self.weight[self.rows], bias)
        return y_BTF if self.adapter is None else y_BTF + self.adapter(x_BTC)[..., self.rows]


class VocabularyEmbedding(nn.Module):
    """The embedding of the tokens from number `first` on, of `vocabulary` that the ranks share."""

    def __init__(
        self, weight: nn.Parameter, first: int, vocabulary: int, stream: TensorStream
    ) -> None:
        super().__init__()
        self.weight, self.first, self.vocabulary = weight, first, vocabulary
        self._stream = stream

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the embeddings (B, T, C) of the own tokens, and zeros for the others.

        Raises IndexError, as torch does, for an id that is not in the vocabulary: on a CPU alone,
        where the host need not wait for it.
        """
        on_cpu = ids_BT.device.type == "cpu" and ids_BT.numel()
        if on_cpu and (int(ids_BT.min()) < 0 or int(ids_BT.max()) >= self.vocabulary):
            raise IndexError("index out of range in self")
        places_BT = ids_BT - self.first
        inside_BT = (places_BT >= 0) & (places_BT < len(self.weight))
        x_BTC = F.embedding(places_BT.clamp(0, len(self.weight) - 1), self.weight)
        x_BTC = x_BTC * inside_BT[..., None].to(x_BTC.dtype)
        return self._stream.padded(self._stream.reduced(x_BTC))
