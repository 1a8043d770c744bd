"""The embedding of images: patches as positions, after a learned class token (ViT).

Shapes: B images, T positions (patches + 1), C width.
"""

import torch
from torch import Tensor, nn

from mpillm.errors import DataError


class PatchEmbedding(nn.Module):
    """A product of each patch (Dosovitskiy et al. 2021), the class token, and learned positions."""

    def __init__(self, image_size: int, patch_size: int, channels: int, width: int) -> None:
        """`image_size`, `patch_size`: height and width in pixels."""
        super().__init__()
        self.shape = channels, image_size, image_size
        positions = (image_size // patch_size) ** 2 + 1
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, positions, width))
        self.projection = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embedded patches (B, T − 1, C) of `pixels` (B, channels, height, width).

        Raises DataError for images of another size.
        """
        if pixels.shape[1:] != self.shape:
            raise DataError(
                f"an image of (channels, height, width) = {tuple(pixels.shape[1:])} is none of the "
                f"model, which reads {self.shape}; set model.channels and model.image_size, or "
                "prepare images of that size"
            )
        x_BCHW = self.projection(pixels.to(self.projection.weight.dtype))
        x_BTC: Tensor = x_BCHW.flatten(2).transpose(1, 2)
        return x_BTC

    def with_positions(self, x_BTC: Tensor) -> Tensor:
        """Put the class token ahead of the patches, and add the positions: (B, T, C)."""
        first_B1C = self.class_token.to(x_BTC.dtype).expand(len(x_BTC), -1, -1)
        return torch.cat([first_B1C, x_BTC], dim=1) + self.position
