"""The distributions of a teacher, chunk by chunk: its logits never exist as a whole.

Shapes: N positions (B · T), n those of a chunk, t of a tile, C width, V vocabulary, K top logits.
"""

import torch
from torch import Tensor

from mpillm.models.head_chunks import tile_positions
from mpillm.models.linear_head import LinearHead
from mpillm.tasks.chunked_cross_entropy import cap_logits


class TeacherRows:
    """The softmax of a teacher's logits at a temperature, over the positions of a batch in order.

    `output`: logits (…, V), or a head of the whole vocabulary. `top_k`: the largest logits that
    share the probability; 0: all.
    """

    def __init__(
        self, output: Tensor | LinearHead, temperature: float = 1.0, top_k: int = 0
    ) -> None:
        self._temperature, self._top_k = temperature, top_k
        if isinstance(output, LinearHead):
            assert output.shard is None, "a teacher has all of its vocabulary"
            self._output: Tensor | LinearHead = output._replace(
                hidden_BTC=output.hidden_BTC.detach().flatten(0, -2)
            )
        else:
            self._output = output.detach().flatten(0, -2)

    @torch.no_grad()
    def distribution(self, chunk: slice) -> Tensor:
        """Return the probabilities (n, V) of a chunk in new memory; float32 or float64."""
        probabilities_nV = self._logits(chunk)
        positions, vocabulary = probabilities_nV.shape
        tiles = tile_positions(positions, vocabulary, probabilities_nV.device.type)
        for first in range(0, positions, tiles):
            # Copies of a tile stay in the second cache.
            self._soften(probabilities_nV[first : first + tiles])
        return probabilities_nV

    def _soften(self, logits_tV: Tensor) -> None:
        """Replace the logits of a tile by probabilities."""
        if 0 < self._top_k < logits_tV.shape[1]:
            largest_tK, places_tK = logits_tV.topk(self._top_k, sorted=False)
            own_tK = (largest_tK / self._temperature).softmax(1)
            logits_tV.zero_().scatter_(1, places_tK, own_tK)
        else:
            logits_tV.copy_((logits_tV / self._temperature).softmax(1))

    def _logits(self, chunk: slice) -> Tensor:
        """Compute the logits of a chunk in new memory, float32 or float64."""
        output = self._output
        if isinstance(output, Tensor):
            logits_nV = output[chunk]
            wide = torch.promote_types(logits_nV.dtype, torch.float32)
            return logits_nV.to(wide, copy=True)
        hidden_nC, weight_VC, bias_V = output.tensors
        hidden_nC = hidden_nC[chunk]
        weight_VC = weight_VC.detach().to(hidden_nC.dtype)
        with torch.autocast(hidden_nC.device.type, enabled=False):
            if bias_V is None:
                logits_nV = torch.mm(hidden_nC, weight_VC.t())
            else:
                logits_nV = torch.addmm(bias_V.detach().to(hidden_nC), hidden_nC, weight_VC.t())
        cap_logits(logits_nV, output.soft_cap, False)
        return logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
