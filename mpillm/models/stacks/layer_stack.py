"""What the Transformers of all architectures share: how their blocks are begun, computed and
compiled.

Shapes: B sequences, T positions, C width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mpillm.models.block_settings import BlockSettings
from mpillm.models.layers.block import Balances, Block, BlockLayers
from mpillm.models.layers.dropout import MaskKeys, PlacedKeys, layer_keys
from mpillm.models.layers.recompute import recomputed
from mpillm.models.layers.rotary import Rotary, Rotation
from mpillm.models.part_module import Fields, PartModule
from mpillm.models.spec import Recompute, recompute_of

# Outputs that are added to the stream, of cross-attentions too. Their initial deviation is smaller
# by the root of their number, so that the variance of the stream does not grow with depth (GPT-2,
# Radford et al. 2019, section 2.3).
RESIDUAL_OUTPUTS = ("attention.output.weight", ".down.weight")


class Transformer(PartModule):
    """Blocks of one or several stacks: initial values, recomputation and dropout."""

    config: BlockSettings
    keeps_outputs = True

    def additions(self, name: str) -> int:
        """Return how many outputs the stream of the weight `name` sums; 1: it is normed each time.

        Two a block, by default: of attention and feed-forward.
        """
        return 2 * self.config.layers

    def deviation_of(self, name: str) -> float:
        deviation = self.initial_deviation
        if name.endswith(RESIDUAL_OUTPUTS):
            deviation /= self.additions(name) ** 0.5
        return deviation

    def fill_of(self, name: str) -> float:
        return 0.0 if self.config.norm == "rmsnorm1p" else 1.0

    def set_recompute(self, recompute: Recompute) -> None:
        self.recompute = recompute
        for number, block in self.numbered_blocks():
            assert isinstance(block, BlockLayers)
            block.recomputes_attention = recompute_of(recompute, number) == "attention"

    def _run(self, block: nn.Module, number: int, balances: Balances, *given: Any) -> Tensor:
        """Compute the block `number`, again in the backward pass where that is selected."""
        whole = recompute_of(self.recompute, number) == "full"
        x_BTC = balances.stream_of(recomputed(block, *given) if whole else block(*given))
        if number in self.kept:
            self.kept[number] = x_BTC
        return x_BTC

    def _keys(self, fields: Fields, layer: int) -> MaskKeys | None:
        row_keys_B, positions_T = fields.get("dropout_keys"), fields.get("positions")
        if row_keys_B is None:
            return None
        keys_B = layer_keys(row_keys_B, layer)
        return keys_B if positions_T is None else PlacedKeys(keys_B, positions_T)


class LayerStack(Transformer):
    """A Transformer of one stack, whose blocks have one graph."""

    def _add_layers(self, causal: bool) -> None:
        """Make the blocks and the rotations of their positions: those of a window may differ."""
        config = self.config
        rotary = config.positions == "rotary"
        self.rotary = Rotary(config) if rotary else None
        windowed = rotary and config.window_rope_theta > 0
        self.window_rotary = Rotary(config, windowed=True) if windowed else None
        numbers = range(self.part.first, self.part.last)
        self.layers = nn.ModuleDict({str(n): Block(config, n, causal) for n in numbers})

    def numbered_blocks(self) -> Iterator[tuple[int, nn.Module]]:
        return ((int(number), block) for number, block in self.layers.items())

    def _rotations(
        self, first: int, x_BTC: Tensor, positions_T: Tensor | None = None
    ) -> tuple[Rotation | None, Rotation | None]:
        """Return the rotations of the stream's positions, which begin at `first` or are
        `positions_T`: of layers without, and with, a window.
        """
        if self.rotary is None:
            return None, None
        given = first, x_BTC.shape[1], x_BTC.dtype, positions_T
        rotation: Rotation = self.rotary(*given)
        return rotation, rotation if self.window_rotary is None else self.window_rotary(*given)

    def compiled_layers(self) -> list[nn.Module]:
        # Each batch sends another number of positions to an expert: another shape to compile.
        return [] if self.config.experts else list(self.layers.values())

    def layer_arguments(self, rows: int) -> tuple[Any, ...]:
        weight = next(self.layers.parameters())
        shape = (rows, self.config.context, self.config.width)
        x_BTC = torch.zeros(shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
        keys_B = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        keys = keys_B if self.config.drops else None
        rotation = self._rotations(0, x_BTC)[self.config.slides(self.part.first)]
        return x_BTC, rotation, None, None, 0, keys
