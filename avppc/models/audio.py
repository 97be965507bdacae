"""The audio encoder: log-mel features to one feature vector a video frame."""

from __future__ import annotations

from torch import Tensor, nn

from avppc.models.backbones import use_channels_last
from avppc.models.batch_norm import FusedSequential

MEL_FRAMES_PER_VIDEO_FRAME = 4  # a 10 ms hop at 25 video frames a second


class AudioEncoder(nn.Module):
    """Features at the video's clock: log-mel [N, 4 T, B] -> [N, T, features].

    Each input first loses the mean over time of each band, and is then divided by its standard deviation: loudness and
    microphone are gone. Both come from the given frames alone, so a cut element knows nothing of what was cut off.
    """

    REACH = 8
    """Log-mel frames before and after its own that a feature depends on; beyond the ends they are zeros."""

    def __init__(self, bands: int, features: int, width: int = 16) -> None:
        super().__init__()
        self.conv = FusedSequential(
            *self._layer(1, width, 5, (2, 2)),
            *self._layer(width, 2 * width, 3, (2, 2)),
            *self._layer(2 * width, 4 * width, 3, (1, 2)),
        )
        bands_left = -(-bands // 8)
        self.project = nn.Sequential(nn.Linear(4 * width * bands_left, features), nn.LayerNorm(features), nn.ReLU())
        use_channels_last(self)

    @staticmethod
    def _layer(inputs: int, outputs: int, kernel: int, stride: tuple[int, int]) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    def forward(self, log_mel: Tensor) -> Tensor:
        centred = log_mel - log_mel.mean(1, keepdim=True)
        scaled = centred / (centred.std((1, 2), keepdim=True) + 0.1)
        # A channel that was last in memory keeps the maps channels last; torch cannot tell from one channel alone.
        maps = self.conv(scaled.unsqueeze(3).permute(0, 3, 1, 2))  # [N, C, T, B / 8]
        return self.project(maps.transpose(1, 2).flatten(2))
