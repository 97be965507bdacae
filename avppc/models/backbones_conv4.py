"""Four strided convolutions: the frame network for minutes on a CPU."""

from __future__ import annotations

from torch import Tensor, nn


class Conv4(nn.Module):
    """Feature vectors of small frames: [B, C, H, W] -> [B, 4 width (H / 16) (W / 16)].

    The last map is flattened, not averaged: at 32 pixels it is 2 x 2, and where the lips are matters. On the talking
    mouths it read more words than a ResNet-10 of the same width, and it costs less.
    """

    def __init__(self, width: int, in_channels: int, input_pixels: int) -> None:
        super().__init__()
        if input_pixels % 16:
            raise ValueError(f"input_pixels must be a multiple of 16 for conv4, got {input_pixels}")
        sizes = (in_channels, width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for inputs, outputs, kernel in zip(sizes, sizes[1:], (5, 3, 3, 3), strict=False):
            layers += [
                nn.Conv2d(inputs, outputs, kernel, 2, kernel // 2, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers)
        self.out_features = 4 * width * (input_pixels // 16) ** 2

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1)
