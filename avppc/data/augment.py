"""Augmentation of pictures and sound, each clip with draws of its own.

Every function takes the generator its draws come from; the same seed gives the same variations on every device. With a
ClipGenerator (see draws.py) a clip's draws are tied to its place in the whole batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from avppc.config.augment import AugmentConfig
from avppc.data.draws import integers, noise, uniform


def crop_video(
    video: Tensor,  # [N, T, H, W] uint8
    crop_pixels: int,
    out_pixels: int,
    *,
    rows: Tensor | None = None,  # [N] first row of each clip's crop
    columns: Tensor | None = None,  # [N] first column
    flips: Tensor | None = None,  # [N] bool: mirror this clip
) -> Tensor:
    """Square crops as luma from 0 to 1, reduced by block means: [N, T, out, out] float32; the centre by default."""
    height, width = video.shape[2:]
    if crop_pixels > min(height, width):
        raise ValueError(
            f"crop_pixels must be at most {min(height, width)} for {height} x {width} video, got {crop_pixels}"
        )
    if rows is None and columns is None and flips is None:
        top, left = (height - crop_pixels) // 2, (width - crop_pixels) // 2
        crops = video[:, :, top : top + crop_pixels, left : left + crop_pixels]
    else:
        crops = _crop_each(video, crop_pixels, rows, columns, flips)
    luma = crops.to(torch.float32).div_(255.0)
    if out_pixels == crop_pixels:
        return luma
    return functional.avg_pool2d(luma, crop_pixels // out_pixels)


def _crop_each(video: Tensor, size: int, rows: Tensor | None, columns: Tensor | None, flips: Tensor | None) -> Tensor:
    count, _, height, width = video.shape
    device = video.device
    top = torch.full((count,), (height - size) // 2, device=device) if rows is None else rows
    left = torch.full((count,), (width - size) // 2, device=device) if columns is None else columns
    steps = torch.arange(size, device=device)
    across = left.to(device)[:, None] + steps
    if flips is not None:
        across = torch.where(flips.to(device)[:, None], across.flip(1), across)
    if device.type == "cpu":
        # Slices copy whole rows; one gather over all clips was measured five times slower.
        crops = torch.empty(count, video.shape[1], size, size, dtype=video.dtype)
        for clip, (first_row, first_column) in enumerate(zip(top.tolist(), left.tolist(), strict=True)):
            crops[clip] = video[clip, :, first_row : first_row + size, first_column : first_column + size]
        if flips is not None and flips.any():
            crops[flips] = crops[flips].flip(3)
        return crops
    down = top.to(device)[:, None] + steps
    clips = torch.arange(count, device=device)
    return video[clips[:, None, None], :, down[:, :, None], across[:, None, :]].movedim(3, 1)


def augment_video(
    video: Tensor,  # [N, T, H, W] uint8
    crop_pixels: int,
    out_pixels: int,
    config: AugmentConfig,
    generator: torch.Generator,
) -> Tensor:
    """Random crop, mirroring, gamma, contrast, brightness, noise and time mask: [N, T, out, out] luma, about 0 to 1."""
    count, _, height, width = video.shape
    rows, columns = (
        _draw_start(count, size, crop_pixels, config.shift_pixels, generator, video.device) for size in (height, width)
    )
    flips = uniform(count, 0.0, 1.0, generator, video.device) < config.flip_probability
    luma = crop_video(video, crop_pixels, out_pixels, rows=rows, columns=columns, flips=flips)
    luma = _vary_light(luma, config, generator)
    if config.time_mask_frames:
        luma = _mask_time(luma, config.time_mask_frames, generator)
    return luma


def _draw_start(
    count: int, size: int, crop: int, shift: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    centre = (size - crop) // 2
    return integers(count, max(0, centre - shift), min(size - crop, centre + shift), generator, device)


def _uniform(low: float, high: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """[N, 1, ...] uniform draws that broadcast over `like` [N, ...]."""
    return uniform(len(like), low, high, generator, like.device).view(-1, *[1] * (like.ndim - 1))


def _vary_light(luma: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    if config.gamma_range:
        bound = math.log(1.0 + config.gamma_range)
        luma = luma.clamp_min(1e-3) ** _uniform(-bound, bound, generator, luma).exp()
    if config.contrast_range:
        factor = _uniform(1 - config.contrast_range, 1 + config.contrast_range, generator, luma)
        luma = (luma - 0.5) * factor + 0.5
    if config.brightness_range:
        luma = luma + _uniform(-config.brightness_range, config.brightness_range, generator, luma)
    if config.pixel_noise:
        deviation = _uniform(0, config.pixel_noise, generator, luma)
        luma = luma + deviation * noise(luma.shape, generator, luma.device)
    return luma


def _span_mask(count: int, size: int, longest: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """[N, size] bool: one span of 0 to `longest` places a row, anywhere in it."""
    lengths = integers(count, 0, min(longest, size), generator, device)
    starts = integers(count, 0, size - lengths, generator, device)
    places = torch.arange(size, device=device)
    return (places >= starts[:, None]) & (places < (starts + lengths)[:, None])


def _mask_time(luma: Tensor, longest: int, generator: torch.Generator) -> Tensor:
    mask = _span_mask(luma.shape[0], luma.shape[1], longest, generator, luma.device)
    return torch.where(mask[:, :, None, None], luma.mean(1, keepdim=True), luma)


def augment_log_mel(
    log_mel: Tensor,  # [N, F, B] natural logarithm of mel power
    config: AugmentConfig,
    generator: torch.Generator,
) -> Tensor:
    """Circular shift, noise floor and band mask: [N, F, B]."""
    count, frames, bands = log_mel.shape
    device = log_mel.device
    if config.mel_shift_frames:
        shifts = integers(count, -config.mel_shift_frames, config.mel_shift_frames, generator, device)
        places = (torch.arange(frames, device=device) - shifts[:, None]) % frames
        log_mel = log_mel.gather(1, places[:, :, None].expand(-1, -1, bands))
    if config.mel_noise_floor:
        level = log_mel.mean((1, 2), keepdim=True) + _uniform(-8.0, -1.0, generator, log_mel)
        tilt = _uniform(-2.0, 2.0, generator, log_mel) * torch.linspace(-1, 1, bands, device=device)
        ripple = 0.5 * noise(log_mel.shape, generator, device)
        log_mel = torch.logaddexp(log_mel, level + tilt + ripple)
    if config.mel_mask_bands:
        mask = _span_mask(count, bands, config.mel_mask_bands, generator, device)
        log_mel = torch.where(mask[:, None, :], log_mel.mean((1, 2), keepdim=True), log_mel)
    return log_mel
