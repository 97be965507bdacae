"""Settings of the encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from avppc.checks import check_integer, check_types
from avppc.clip import CROP_SIZE

__all__ = ["EncoderConfig"]


ChannelsName = Literal["luma", "motion", "local-motion"]


@dataclass(frozen=True)
class EncoderConfig:
    """The visual encoder: from a mouth crop to one feature vector a frame."""

    backbone: Literal["conv4", "resnet10", "resnet18", "resnet34"] = "conv4"
    """The frame network: "conv4", four strided convolutions for a CPU, or a ResNet."""
    width: int = 16
    """Channels of its first stage, 8 or more for a ResNet; 64 in the standard one."""
    stem: Literal["small", "2d", "3d"] = "2d"
    """First layers of a ResNet: "small" for inputs up to 48 pixels; "2d" as published; "3d" with a convolution over 5
    frames as well."""
    channels: ChannelsName = "local-motion"
    """What a frame shows the network: "luma", the normalised frame; "motion", the previous, this and the next frame,
    each less the clip's mean frame, and the standardised frame; "local-motion", the same less the mean of the 7 frames
    around, so that past and future of a clip may be encoded in one pass."""
    crop_pixels: int = 64
    """Side of the square cut from the stored 96-pixel crop."""
    input_pixels: int = 32
    """Side of the network's input; a divisor of crop_pixels (the crop is reduced by block means)."""
    features: int = 64
    """Width of a frame's feature vector."""

    def __post_init__(self) -> None:
        check_types(self)
        check_integer("width", self.width, 4, 512)
        if self.backbone != "conv4" and self.width < 8:
            # oneDNN #6035: the weight gradient of a 1 x 1 convolution of stride 2, channels last, on AVX2
            raise ValueError(
                f"width must be 8 or more for a ResNet, got {self.width}: with 4 to 6 channels, on some CPUs, oneDNN "
                "computes wrong gradients of its shortcuts and writes beyond its memory"
            )
        if self.backbone != "conv4" and self.stem == "3d" and self.channels != "luma":
            raise ValueError("stem '3d' sees neighbouring frames by itself: use it with channels='luma'")
        check_integer("crop_pixels", self.crop_pixels, 8, CROP_SIZE)
        check_integer("input_pixels", self.input_pixels, 8, self.crop_pixels)
        if self.crop_pixels % self.input_pixels:
            raise ValueError(f"input_pixels must divide crop_pixels, got {self.input_pixels} and {self.crop_pixels}")
        check_integer("features", self.features, 8, 65_536)
