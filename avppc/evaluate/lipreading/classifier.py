"""Word classifiers: what they see of the clips (frozen features, pictures, true mouth movement), and their training."""

from __future__ import annotations

import copy
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from avppc.clip import CLIP_FRAMES
from avppc.data.augment import augment_video, crop_video
from avppc.data.config import AugmentConfig
from avppc.data.packed.dataset import Clips
from avppc.evaluate.config import EvaluateConfig, RecipeConfig
from avppc.models.encoders import VideoEncoder
from avppc.train.checkpoint import map_tensors, write_tensors
from avppc.train.hardware import autocast

HeldOutSplit = Literal["val", "test"]
HELD_OUT_SPLITS: tuple[str, ...] = get_args(HeldOutSplit)
BATCH = 64
# An encoder that stays as it is sees each labelled clip once in each of these ways, and heads are trained on features
# of all of them: (pixels that the crop is moved down, pixels to the right, whether it is mirrored). The first is the
# plain centre, as clips of validation and test are seen.
VIEWS = ((0, 0, False), (0, 0, True), (4, 2, False), (-4, -2, True))


class ClassifierData(Protocol):
    """What a classifier sees of the clips: frozen features, the true mouth movement, or pictures."""

    def training_inputs(self, clips: Tensor, generator: torch.Generator) -> Tensor:
        """[N, T, ...] what it sees of the training clips with these indices, varied at random."""

    def split_inputs(self, split: HeldOutSplit) -> Iterator[Tensor]:
        """Batches [N, T, ...] of what it sees of a whole split, in order and not varied."""


def fit_classifier(
    model: nn.Module,
    groups: list[dict[str, object]],
    data: ClassifierData,
    train: tuple[Tensor, Tensor],  # [n] indices and [n] labels of the labelled clips
    val_labels: Tensor,  # [m]
    config: EvaluateConfig,
    epochs: int,
    seed: int,
) -> float:
    """Trains with AdamW and leaves the model with the weights of its best epoch by the validation clips.

    Args:
        groups: the optimizer's parameter groups; each one's "lr" is the peak of its schedule.
        config: batch_size, validate_every and recipe are used.
        seed: of the order and the variation of the clips.

    Returns:
        The best rate of right words on the validation clips, 0 to 1.
    """
    clips, labels = train
    device = labels.device
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    # A batch of one clip would have no batch statistics: batches are as even as possible, of at least two clips.
    batches = max(1, min(round(len(clips) / config.batch_size), len(clips) // 2))
    optimizer = torch.optim.AdamW(groups, weight_decay=config.recipe.weight_decay, fused=True)
    schedule = _make_schedule(optimizer, config.recipe, epochs * batches)
    best, best_state = -1.0, model.state_dict()
    for epoch in range(1, epochs + 1):
        model.train()
        for chosen in torch.randperm(len(clips), generator=generator).tensor_split(batches):
            inputs = data.training_inputs(clips[chosen], generator).to(device)
            loss = _loss(model, inputs, labels[chosen.to(device)], config.recipe, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.recipe.clip_norm)
            optimizer.step()
            schedule.step()
        last = epoch == epochs
        if last or (2 * epoch >= epochs and (epochs - epoch) % config.validate_every == 0):
            rate = (predict(model, data, "val") == val_labels.cpu()).float().mean().item()
            if rate >= best:
                best, best_state = rate, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return best


def _make_schedule(
    optimizer: torch.optim.Optimizer, recipe: RecipeConfig, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if recipe.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rates = [group["lr"] for group in optimizer.param_groups]
    rise = 0.25 if steps == 5 else 0.2  # a rise of exactly one step would be a division by zero
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps, pct_start=rise, cycle_momentum=False
    )


def _loss(model: nn.Module, inputs: Tensor, labels: Tensor, recipe: RecipeConfig, generator: torch.Generator) -> Tensor:
    """Cross-entropy; with mixup each clip is blended with another, and both words count with the same shares."""
    if not recipe.mixup:
        return functional.cross_entropy(model(inputs).float(), labels, label_smoothing=recipe.label_smoothing)
    seed = int(torch.randint(0, 1 << 62, (), generator=generator))
    share = float(np.random.default_rng(seed).beta(recipe.mixup, recipe.mixup))
    partner = torch.randperm(len(labels), generator=generator).to(labels.device)
    logits = model(share * inputs + (1.0 - share) * inputs[partner]).float()
    first, second = (
        functional.cross_entropy(logits, words, label_smoothing=recipe.label_smoothing)
        for words in (labels, labels[partner])
    )
    return share * first + (1.0 - share) * second


@torch.inference_mode()
def predict(model: nn.Module, data: ClassifierData, split: HeldOutSplit) -> Tensor:
    """[clips] int64 on the CPU, the most probable word of each clip of a split; batch norms in eval mode."""
    model.eval()
    return torch.cat([model(inputs).argmax(1).cpu() for inputs in data.split_inputs(split)])


def shift_in_time(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """[N, T, ...] the batch as it is or one frame earlier or later; the frame at one end moves to the other."""
    return inputs.roll(int(torch.randint(-1, 2, (), generator=generator)), 1)


class FrozenFeatures:
    """Features of every frame, computed once: the labelled clips in several views, those of val and test in one."""

    def __init__(
        self,
        train: Tensor,
        val: Tensor,
        test: Tensor,
        train_clips: Tensor,
        mean: Tensor | None = None,
        deviation: Tensor | None = None,
    ) -> None:
        """
        Args:
            train: [views, n, T, D] of labelled clips.
            val, test: [m, T, D] of all clips of these splits.
            train_clips: [n] indices of the labelled clips in the training split.
            mean, deviation: [D] that they were standardised by; None: 0 and 1.
        """
        self.train = train
        self.mean = train.new_zeros(self.width) if mean is None else mean
        self.deviation = train.new_ones(self.width) if deviation is None else deviation
        self._splits = {"val": val, "test": test}
        self._train_clips = train_clips
        self._places = {clip: place for place, clip in enumerate(train_clips.tolist())}

    @classmethod
    def standardised(cls, train: Tensor, val: Tensor, test: Tensor, train_clips: Tensor) -> FrozenFeatures:
        """From features that are first brought to mean 0 and deviation 1 over the labelled clips, first view."""
        mean, deviation = train[0].mean((0, 1)), train[0].std((0, 1)) + 1e-3
        train, val, test = ((values - mean) / deviation for values in (train, val, test))
        return cls(train, val, test, train_clips, mean, deviation)

    def save(self, path: Path) -> None:
        """Writes the features to a file, which `load` opens in another process."""
        standard = {"mean": self.mean, "deviation": self.deviation}
        write_tensors(path, {"train": self.train, **self._splits, "train_clips": self._train_clips, **standard})

    @classmethod
    def load(cls, path: Path) -> FrozenFeatures:
        """The features in a file of `save`, memory-mapped: all processes share one copy."""
        return cls(**map_tensors(path))

    @property
    def width(self) -> int:
        """D, the number of features a frame."""
        return self.train.shape[-1]

    def training_inputs(self, clips: Tensor, generator: torch.Generator) -> Tensor:
        places = torch.tensor([self._places[clip] for clip in clips.tolist()])
        views = torch.randint(0, len(self.train), (len(clips),), generator=generator)
        return shift_in_time(self.train[views, places], generator)

    def split_inputs(self, split: HeldOutSplit) -> Iterator[Tensor]:
        yield from self._splits[split].split(256)


class MouthPictures:
    """Crops of the clips as an encoder takes them: for training at random places, else of the centre."""

    def __init__(
        self, splits: Mapping[str, Clips], encoder: VideoEncoder, device: torch.device, augment: AugmentConfig
    ) -> None:
        self.splits = splits
        self.augment = augment
        self.config = encoder.config
        self.device = device

    def training_inputs(self, clips: Tensor, generator: torch.Generator) -> Tensor:
        video = self.splits["train"].batch(clips).video.to(self.device)
        crops = augment_video(video, self.config.crop_pixels, self.config.input_pixels, self.augment, generator)
        return shift_in_time(crops, generator)

    def split_inputs(self, split: HeldOutSplit) -> Iterator[Tensor]:
        dataset = self.splits[split]
        for clips in torch.arange(len(dataset)).split(BATCH):
            video = dataset.batch(clips).video.to(self.device)
            yield crop_video(video, self.config.crop_pixels, self.config.input_pixels)


class EncoderWithHead(nn.Module):
    """Logits of the words from pictures, [N, T, H, W] -> [N, words]: the encoder under autocast, the head in float32.

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
    dataset: Clips,
    clips: Tensor,  # [n] indices
    view: tuple[int, int, bool],
    device: torch.device,
    bf16: bool,
) -> Tensor:
    """[n, T, D] features on the CPU, in eval mode, of these clips in one of VIEWS."""
    encoder.eval()
    crop, side = encoder.config.crop_pixels, encoder.config.input_pixels
    features = []
    for part in clips.split(BATCH):
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
    encoder: VideoEncoder, splits: Mapping[str, Clips], train_clips: Tensor, device: torch.device, bf16: bool
) -> FrozenFeatures:
    """Features of the labelled clips in every view, and of the validation and test clips in the first."""
    train = torch.stack([encode_split(encoder, splits["train"], train_clips, view, device, bf16) for view in VIEWS])
    val, test = (
        encode_split(encoder, splits[name], torch.arange(len(splits[name])), VIEWS[0], device, bf16)
        for name in HELD_OUT_SPLITS
    )
    return FrozenFeatures.standardised(train, val, test, train_clips)


def read_trajectories(root: Path, splits: Mapping[str, Clips], train_clips: Tensor) -> FrozenFeatures:
    """The true mouth movement of synthetic clips in the place of features: D mouth parameters a frame, in one view.

    Args:
        root: the directory that `avppc synth` wrote, which has the movement beside each video.

    Raises:
        FileNotFoundError: a clip has no trajectory.
        ValueError: a file is not a trajectory; the text names it.
    """

    def movements(split: str, clips: Tensor) -> Tensor:
        return torch.stack([read_trajectory(root / splits[split].sources[clip]) for clip in clips.tolist()])

    train = movements("train", train_clips).unsqueeze(0)
    val, test = (movements(split, torch.arange(len(splits[split]))) for split in HELD_OUT_SPLITS)
    return FrozenFeatures.standardised(train, val, test, train_clips)


# All that numpy raises for a damaged header, Python's parser below it included: the last two if it nests too deep.
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
