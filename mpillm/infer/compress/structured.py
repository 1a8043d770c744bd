"""Structured pruning: whole heads of attention, or columns of feed-forwards, are taken out.

What contributes least to the outputs goes, by the squares of its inputs times those of its weights.
The weights that stay are fitted to the outputs on the calibration data, by least squares. Shapes:
O outputs, I inputs, K kept inputs.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from mpillm.errors import MismatchError
from mpillm.infer.compress.compression_method import CompressionMethod, Cut, Solved
from mpillm.infer.compress.gptq import DAMPING
from mpillm.infer.compress.input_statistics import InputStatistics
from mpillm.models.block_settings import BlockSettings
from mpillm.models.layers.attention import Projections
from mpillm.models.layers.feed_forward import FeedForward
from mpillm.models.spec import ModelSpec

# Widths stay multiples of what kernels read at once.
MULTIPLE = 8


class Structured(CompressionMethod):
    """Take inputs out of the layers that end in `target`, and outputs of the layers ahead."""

    needs_data: ClassVar[bool] = True
    needs_products: ClassVar[bool] = True
    target: ClassVar[str]

    def check_model(self, spec: ModelSpec) -> None:
        if not isinstance(spec, BlockSettings):
            raise MismatchError(
                f"--method {self.name} is for Transformers, and the model is a {spec.architecture}"
            )

    def reads(self, name: str) -> bool:
        return name.endswith(self.target)

    def unit(self, inputs: int) -> int:
        """Return how many inputs in a row belong together."""
        raise NotImplementedError

    def solve(self, weight_OI: Tensor, inputs: InputStatistics | None) -> Solved:
        assert inputs is not None
        assert inputs.products_II is not None
        count, unit = weight_OI.shape[1], self.unit(weight_OI.shape[1])
        effect_I = inputs.squares_I * weight_OI.double().square().sum(0)
        effect = effect_I.view(-1, unit).sum(1)
        kept = kept_of(len(effect), self.options.sparsity, 1 if unit > 1 else MULTIPLE)
        units = effect.argsort(descending=True, stable=True)[:kept].sort().values
        kept_K = (units[:, None] * unit + torch.arange(unit)).flatten()
        return Cut(kept_K, fitted(weight_OI, inputs.products_II, kept_K) if count else weight_OI)


class Columns(Structured):
    """Columns of each feed-forward; the experts of a mixture lose equally many."""

    name: ClassVar[str] = "columns"
    target: ClassVar[str] = ".down"

    def check_model(self, spec: ModelSpec) -> None:
        super().check_model(spec)
        if getattr(spec, "shared_hidden", 0):
            raise MismatchError(
                "--method columns cuts feed-forwards of one width, and the shared expert has "
                "another; take heads, or wanda"
            )

    def unit(self, inputs: int) -> int:
        return 1

    def apply(self, parent: nn.Module, layer: nn.Linear, solved: Solved) -> None:
        assert isinstance(parent, FeedForward)
        assert isinstance(solved, Cut)
        _cut_inputs(layer, solved)
        for ahead in filter(None, (parent.gate, parent.up)):
            _cut_outputs(ahead, solved.kept_K)

    def reshape(self, spec: ModelSpec) -> ModelSpec:
        assert isinstance(spec, BlockSettings)
        hidden = kept_of(spec.hidden_width, self.options.sparsity, MULTIPLE)
        return spec.replace(hidden=hidden)


class Heads(Structured):
    """Heads of each attention; of shared keys and values with all the heads that read them."""

    name: ClassVar[str] = "heads"
    target: ClassVar[str] = "attention.output"

    def check_model(self, spec: ModelSpec) -> None:
        super().check_model(spec)
        assert isinstance(spec, BlockSettings)
        if spec.key_value_heads < 2 or spec.positions == "relative":
            raise MismatchError(
                f"--method heads takes out keys and values with their heads, and the model has "
                f"{spec.key_value_heads}, with {spec.positions} positions; take columns, or wanda"
            )
        self._groups, self._features = spec.key_value_heads, spec.head_features

    def unit(self, inputs: int) -> int:
        return inputs // self._groups

    def apply(self, parent: nn.Module, layer: nn.Linear, solved: Solved) -> None:
        assert isinstance(parent, Projections)
        assert isinstance(solved, Cut)
        unit = self.unit(layer.in_features)
        _cut_inputs(layer, solved)
        _cut_outputs(parent.query, solved.kept_K)
        groups = solved.kept_K[::unit] // unit
        own_K = (groups[:, None] * self._features + torch.arange(self._features)).flatten()
        for ahead in (parent.key, parent.value):
            _cut_outputs(ahead, own_K)

    def reshape(self, spec: ModelSpec) -> ModelSpec:
        assert isinstance(spec, BlockSettings)
        groups = kept_of(spec.key_value_heads, self.options.sparsity, 1)
        return spec.replace(
            heads=spec.heads // spec.key_value_heads * groups,
            kv_heads=groups,
            head_width=spec.head_features,
        )


def kept_of(count: int, sparsity: float, multiple: int) -> int:
    """Return how many of `count` are kept: a multiple, where `count` is one, and one at least."""
    multiple = multiple if count % multiple == 0 else 1
    return max(1, round(count * (1 - sparsity) / multiple)) * multiple


def fitted(weight_OI: Tensor, products_II: Tensor, kept_K: Tensor) -> Tensor:
    """Return the weights (O, K) whose outputs are nearest to those of all inputs."""
    inside_KK = products_II[kept_K][:, kept_K].clone()
    mean = float(inside_KK.diagonal().mean())
    if not mean:
        return weight_OI[:, kept_K]
    # Pulled to the weights as they are, by the damping.
    damping = DAMPING * mean
    inside_KK.diagonal().add_(damping)
    wanted_OK = weight_OI.double() @ products_II[:, kept_K] + damping * weight_OI[:, kept_K]
    solved_KO = torch.cholesky_solve(wanted_OK.t(), torch.linalg.cholesky(inside_KK))
    return solved_KO.t().to(weight_OI.dtype).contiguous()


def _cut_inputs(layer: nn.Linear, cut: Cut) -> None:
    layer.weight = nn.Parameter(cut.weight_OK)
    layer.in_features = cut.weight_OK.shape[1]


def _cut_outputs(layer: nn.Linear, kept_K: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight.detach()[kept_K].clone())
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[kept_K].clone())
    layer.out_features = len(kept_K)
