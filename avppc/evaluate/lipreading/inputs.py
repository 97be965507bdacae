"""What the classifiers see: frozen features, pictures through an encoder, or the true mouth trajectories."""

from __future__ import annotations

import tokenize
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from avppc.clip import CLIP_FRAMES
from avppc.data.augment import augment_video, crop_video
from avppc.data.config import AugmentConfig
from avppc.data.packed.dataset import PackedDataset
from avppc.evaluate.lipreading.classifier import HELD_OUT_SPLITS, HeldOutSplit
from avppc.models.video import VideoEncoder
from avppc.tensor_files import map_tensors, write_tensors
from avppc.train.hardware import autocast

BATCH = 64
# Views of the labelled clips whose features are kept: (shift of rows, shift of columns, mirrored)
VIEWS = ((0, 0, False), (0, 0, True), (4, 2, False), (-4, -2, True))
# Pictures of the labelled clips while an encoder is trained on them
TRAINING_AUGMENT = AugmentConfig(shift_pixels=6, flip_probability=0.5, time_jitter_frames=0)


def shift_in_time(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """The batch one frame earlier, unshifted, or one frame later, [N, T, ...]."""
    return inputs.roll(int(torch.randint(-1, 2, (), generator=generator)), 1)


class FeatureSource:
    """Features computed once: several views of the labelled clips, one view of the others."""

    def __init__(self, train: Tensor, val: Tensor, test: Tensor, train_rows: Tensor) -> None:
        """train [views, n, T, D] of the clips `train_rows` [n] of the training split; val and test [m, T, D]."""
        self.train = train
        self._splits = {"val": val, "test": test}
        self._train_rows = train_rows
        self._places = {row: place for place, row in enumerate(train_rows.tolist())}

    @classmethod
    def standardised(cls, train: Tensor, val: Tensor, test: Tensor, train_rows: Tensor) -> FeatureSource:
        """The same, with each feature brought to mean 0 and deviation 1 over the training clips."""
        mean, deviation = train[0].mean((0, 1)), train[0].std((0, 1)) + 1e-3
        train, val, test = ((values - mean) / deviation for values in (train, val, test))
        return cls(train, val, test, train_rows)

    def save(self, path: Path) -> None:
        """Writes the features for another process."""
        write_tensors(path, {"train": self.train, **self._splits, "train_rows": self._train_rows})

    @classmethod
    def load(cls, path: Path) -> FeatureSource:
        """What `save` wrote."""
        return cls(**map_tensors(path))

    @property
    def features(self) -> int:
        """D, the width of a frame's features."""
        return self.train.shape[-1]

    def training_inputs(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        places = torch.tensor([self._places[row] for row in rows.tolist()])
        views = torch.randint(0, len(self.train), (len(rows),), generator=generator)
        return shift_in_time(self.train[views, places], generator)

    def split_inputs(self, split: HeldOutSplit) -> Iterator[Tensor]:
        yield from self._splits[split].split(256)


class PictureSource:
    """Crops of the clips for an encoder that is trained: varied for training, else the centre."""

    def __init__(
        self,
        splits: dict[str, PackedDataset],
        encoder: VideoEncoder,
        device: torch.device,
        augment: AugmentConfig = TRAINING_AUGMENT,
    ) -> None:
        self.splits = splits
        self.augment = augment
        self.config = encoder.config
        self.device = device

    def training_inputs(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        video = self.splits["train"].batch(rows).video.to(self.device)
        crops = augment_video(video, self.config.crop_pixels, self.config.input_pixels, self.augment, generator)
        return shift_in_time(crops, generator)

    def split_inputs(self, split: HeldOutSplit) -> Iterator[Tensor]:
        dataset = self.splits[split]
        for rows in torch.arange(len(dataset)).split(BATCH):
            video = dataset.batch(rows).video.to(self.device)
            yield crop_video(video, self.config.crop_pixels, self.config.input_pixels)


class EncoderWithHead(nn.Module):
    """Words from pictures: the encoder under autocast, the head in float32.

    Args:
        frozen: the encoder stays as it is: it has no gradients, and its batch norms stay in eval mode.
    """

    def __init__(
        self, encoder: VideoEncoder, head: nn.Module, device: torch.device, bf16: bool, *, frozen: bool = False
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.frozen = frozen
        self._device, self._bf16 = device, bf16

    def forward(self, video: Tensor) -> Tensor:
        with autocast(self._device, self._bf16), torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.encoder(video)
        return self.head(features.float())

    def train(self, mode: bool = True) -> EncoderWithHead:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self


@torch.inference_mode()
def encode_split(
    encoder: VideoEncoder,
    dataset: PackedDataset,
    rows: Tensor,
    view: tuple[int, int, bool],
    device: torch.device,
    bf16: bool,
) -> Tensor:
    """Features [n, T, D] of these clips on the CPU, from crops shifted and mirrored as the view says; eval mode."""
    encoder.eval()
    crop, side = encoder.config.crop_pixels, encoder.config.input_pixels
    features = []
    for part in rows.split(BATCH):
        video = dataset.batch(part).video
        count, (height, width) = len(video), video.shape[2:]
        top = torch.full((count,), _shifted(height, crop, view[0]))
        left = torch.full((count,), _shifted(width, crop, view[1]))
        flips = torch.full((count,), view[2])
        crops = crop_video(video.to(device), crop, side, rows=top, columns=left, flips=flips)
        with autocast(device, bf16):
            features.append(encoder(crops).float().cpu())
    return torch.cat(features)


def _shifted(size: int, crop: int, shift: int) -> int:
    """The first pixel of a crop whose centre is shifted, kept inside the picture."""
    return min(max((size - crop) // 2 + shift, 0), size - crop)


def encode_features(
    encoder: VideoEncoder, splits: dict[str, PackedDataset], train_rows: Tensor, device: torch.device, bf16: bool
) -> FeatureSource:
    """Frozen features of the labelled clips in every view, and of the validation and test clips."""
    train = torch.stack([encode_split(encoder, splits["train"], train_rows, view, device, bf16) for view in VIEWS])
    val, test = (
        encode_split(encoder, splits[name], torch.arange(len(splits[name])), VIEWS[0], device, bf16)
        for name in HELD_OUT_SPLITS
    )
    return FeatureSource.standardised(train, val, test, train_rows)


def read_trajectories(root: Path, splits: dict[str, PackedDataset], train_rows: Tensor) -> FeatureSource:
    """The true mouth movement of each clip, which `avppc synth` wrote beside the videos: [n, 29, 8] a split.

    Raises:
        FileNotFoundError: a clip has no trajectory.
        ValueError: a file is not a trajectory; the text names it.
    """
    rows = {"train": train_rows, **{name: torch.arange(len(splits[name])) for name in HELD_OUT_SPLITS}}
    tensors = {}
    for name, chosen in rows.items():
        sources = splits[name].sources
        tensors[name] = torch.stack([read_trajectory(root / sources[row]) for row in chosen.tolist()])
    return FeatureSource.standardised(tensors["train"].unsqueeze(0), tensors["val"], tensors["test"], train_rows)


# All errors that numpy passes on; the last two are what Python's parser raises for a header that is nested too deep.
_BAD_HEADER = (ValueError, EOFError, OverflowError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError)


def read_trajectory(video: Path) -> Tensor:
    """The mouth movement beside a video, [29, parameters] float32; ValueError, naming the file, if it is none."""
    path = video.with_suffix(".npy")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: trajectories must be the directory that `avppc synth` wrote")
    try:
        # a memory map takes no memory for a shape that the header merely claims
        values = np.lib.format.open_memmap(path, mode="r")
    except _BAD_HEADER as error:
        raise ValueError(f"{path} is not a trajectory: {str(error) or type(error).__name__}") from error
    if values.ndim != 2 or values.shape[0] != CLIP_FRAMES or values.dtype.kind != "f":
        raise ValueError(f"{path} must hold [{CLIP_FRAMES}, parameters], got {values.dtype} of shape {values.shape}")
    return torch.from_numpy(values.astype(np.float32))
