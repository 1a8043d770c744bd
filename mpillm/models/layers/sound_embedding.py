"""The embedding of sound: frames of a log-mel spectrogram through two convolutions (Whisper).

Shapes: B sequences, F frames, S positions (half of the frames), C width.
"""

from torch import Tensor, nn
from torch.nn import functional as F

# Frames that a position sees on each of its sides, itself in the middle.
KERNEL, PADDING, STRIDE = 3, 1, 2


class SoundEmbedding(nn.Module):
    """Two convolutions over time with GELU; the second halves the rate (Radford et al. 2022)."""

    def __init__(self, mels: int, width: int) -> None:
        """`mels`: the features of a frame."""
        super().__init__()
        self.first = nn.Conv1d(mels, width, KERNEL, padding=PADDING)
        self.second = nn.Conv1d(width, width, KERNEL, stride=STRIDE, padding=PADDING)

    def forward(self, frames_BFM: Tensor) -> Tensor:
        """Return the positions (B, S, C) of the frames (B, F, mels)."""
        x_BMF = frames_BFM.to(self.first.weight.dtype).transpose(1, 2)
        x_BCS = F.gelu(self.second(F.gelu(self.first(x_BMF))))
        # Contiguous, as streams between stages are: products of other strides round otherwise.
        return x_BCS.transpose(1, 2).contiguous()
