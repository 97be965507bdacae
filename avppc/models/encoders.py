"""The encoders: mouth crops, or log-mel features, to one feature vector a video frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from avppc.checks import FLOAT_DTYPES, check_integer, check_tensor, is_autocast_on
from avppc.models.backbones import RESNET_LAYERS, Conv4, ResNet, use_channels_last
from avppc.models.batch_norm import FusedSequential
from avppc.models.config import EncoderConfig
from avppc.ops.clips import local_motion_frames, motion_frames
from avppc.settings import config_from_dict

LUMA_MEAN, LUMA_STD = 0.421, 0.165  # usual for LRW's mouth crops, of grey pixels from 0 to 1
LOCAL_REACH = 3  # frames before and after its own that local motion is told from: what the sound's window needs anyway
MEL_FRAMES_PER_VIDEO_FRAME = 4  # a 10 ms hop at 25 video frames a second


def luma_channels(video: Tensor) -> Tensor:
    """The normalised frame as the one channel: [N, T, H, W] in 0..1 -> [N, T, 1, H, W]."""
    return ((video - LUMA_MEAN) / LUMA_STD).unsqueeze(2)


class VideoEncoder(nn.Module):
    """Features of the frames of mouth crops: [N, T, side, side] luma, 0 to 1 -> [N, T, D].

    The luma is video's: black is 16/255 and white 235/255, as `crop_video` gives it from stored clips. Grey pixels from
    elsewhere, 0 black to 1 white, have 16% more contrast than it was trained on: `grey_to_luma` converts them.

    Args:
        config: what the encoder is made of, or its fields as a dict, as huggingface_hub's mixin gives them; side is its
            input_pixels, D its features.

    Examples:
        >>> encoder = VideoEncoder(EncoderConfig())
        >>> encoder(torch.zeros(2, 29, 32, 32)).shape
        torch.Size([2, 29, 64])
    """

    def __init__(
        self,
        config: EncoderConfig | dict[str, Any] = EncoderConfig(),  # noqa: B008 - a frozen dataclass
    ) -> None:
        super().__init__()
        if isinstance(config, dict):
            config = config_from_dict(EncoderConfig, config, "config")
        if not isinstance(config, EncoderConfig):
            raise TypeError(f"config must be an EncoderConfig, got {type(config).__name__}")
        self.config = config
        self.out_features = config.features
        self.frames = self._make_frames(config)
        self.project = nn.Sequential(
            nn.Linear(self.frames.out_features, config.features), nn.LayerNorm(config.features), nn.ReLU()
        )
        use_channels_last(self)

    @property
    def reach(self) -> int:
        """Video frames before and after its own that a feature depends on, apart from the mean frame of "motion"."""
        if hasattr(self, "stem3d"):
            return 2
        return {"luma": 0, "motion": 1, "local-motion": LOCAL_REACH}[self.config.channels]

    @property
    def is_local(self) -> bool:
        """Whether a feature depends on no frame beyond `reach`: one pass over a clip then holds for its parts."""
        return self.config.channels != "motion"

    def _make_frames(self, config: EncoderConfig) -> Conv4 | ResNet:
        width, channels = config.width, 1 if config.channels == "luma" else 4
        if config.backbone == "conv4":
            return Conv4(width, channels, config.input_pixels)
        layers = RESNET_LAYERS[config.backbone]
        if config.stem != "3d":
            return ResNet(layers, width, channels, config.stem)
        self.stem3d = nn.Sequential(
            nn.Conv3d(1, width, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        return ResNet(layers, width, stem="none")

    def forward(
        self,
        video: Tensor,  # [N, T, H, W] luma (black 16/255, white 235/255), H = W = config.input_pixels
        *,
        frame_stride: int = 1,
        frame_phase: int = 0,
    ) -> Tensor:
        """Features [N, T', D] of every frame_stride-th frame from frame_phase on; motion is taken at the full rate.

        Args:
            video: [N, T, side, side] luma, 16/255 black to 235/255 white, side = config.input_pixels.
            frame_stride: the distance of the frames that get features.
            frame_phase: the first of them.
        """
        self._check(video)
        check_integer("frame_stride", frame_stride, 1, 1 << 20)
        check_integer("frame_phase", frame_phase, 0, video.shape[1] - 1)
        if hasattr(self, "stem3d"):
            volume = self.stem3d(((video - LUMA_MEAN) / LUMA_STD).unsqueeze(1)).transpose(1, 2)
            frames = volume[:, frame_phase::frame_stride].flatten(0, 1)
        elif self.config.channels == "motion":
            frames = motion_frames(video, frame_stride, frame_phase)
        elif self.config.channels == "local-motion":
            frames = local_motion_frames(video, LOCAL_REACH, frame_stride, frame_phase)
        else:
            frames = luma_channels(video)[:, frame_phase::frame_stride].flatten(0, 1)
        features = self.project(self.frames(frames.contiguous(memory_format=torch.channels_last)))
        return features.unflatten(0, video[:, frame_phase::frame_stride].shape[:2])

    def _check(self, video: Tensor) -> None:
        side = self.config.input_pixels
        check_tensor("video", video)
        if video.ndim != 4 or video.shape[2:] != (side, side) or 0 in video.shape:
            raise ValueError(f"video must be [N, T, {side}, {side}] (see avppc.data.augment), got {list(video.shape)}")
        if video.dtype not in FLOAT_DTYPES:
            raise TypeError(f"video must be floating point, luma from 0 to 1, got {video.dtype}")
        weight = next(self.parameters())
        if video.device != weight.device:
            raise ValueError(f"video must be on {weight.device} like the encoder, got {video.device}")
        if video.dtype != weight.dtype and not is_autocast_on(video.device.type):
            raise TypeError(f"video must have dtype {weight.dtype} like the encoder, got {video.dtype}")


class OwnEncoder(nn.Module):
    """Any module [N, T, H, W] -> [N, T, D] in VideoEncoder's place in a proxy task.

    Args:
        module: gets luma from 0 to 1, float32 or under autocast. Its attribute `reach`, if it has one, says how many
            video frames before and after its own a feature depends on; without one, past and future are always encoded
            apart.
        features: D.
    """

    def __init__(self, module: nn.Module, features: int) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"encoder must be a torch.nn.Module, got {type(module).__name__}")
        reach = getattr(module, "reach", 0)
        check_integer("encoder.reach", reach, 0, 1 << 20)
        self.module, self.out_features, self.reach = module, features, reach
        self.is_local = hasattr(module, "reach")

    def forward(self, video: Tensor, *, frame_stride: int = 1, frame_phase: int = 0) -> Tensor:
        """As of VideoEncoder; all frames are encoded."""
        features = self.module(video)
        expected = (*video.shape[:2], self.out_features)
        if not isinstance(features, Tensor) or features.shape != expected:
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"encoder must give [N, T, D] = {list(expected)} (D: encoder.features in the settings) for video "
                f"{list(video.shape)}, got {got}"
            )
        return features[:, frame_phase::frame_stride]


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
