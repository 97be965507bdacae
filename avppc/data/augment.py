"""Augmentation of pictures and sound, each clip with draws of its own.

Every function takes the generator its draws come from; the same seed gives the same variations on every device. With a
ClipGenerator (see draws.py) a clip's draws are tied to its place in the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from avppc.checks import check_choice
from avppc.checks_tensors import check_tensor
from avppc.clip import LUMA_BLACK, LUMA_WHITE
from avppc.data.augment_variations import (
    can_fuse,
    check_flips,
    check_pictures,
    check_starts,
    draw_variations,
    span_mask,
    vary,
    vary_fused,
)
from avppc.data.config_augment import AugmentConfig
from avppc.draws import integers, noise, uniform
from avppc.ops.clips import crop_luma


def grey_to_luma(grey: Tensor) -> Tensor:
    """Full-range grey pixels, as OpenCV and Pillow give them, as the luma that encoders are trained on.

    That is video's own range: luma = 16 + grey * 219 / 255, so black is 16 and white 235 (of 255).

    Args:
        grey: any shape; uint8, 0 black to 255 white, or floating point, 0 black to 1 white.

    Returns:
        The same shape and dtype: uint8, rounded, or floating point from 16 / 255 to 235 / 255.

    Examples:
        >>> grey_to_luma(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([ 16, 235], dtype=torch.uint8)
    """
    check_tensor("grey", grey)
    if grey.dtype == torch.uint8:
        return (LUMA_BLACK + grey.float() * ((LUMA_WHITE - LUMA_BLACK) / 255)).round().to(torch.uint8)
    if grey.is_floating_point():
        return (LUMA_BLACK + grey * (LUMA_WHITE - LUMA_BLACK)) / 255
    raise TypeError(f"grey must be uint8 (0 to 255) or floating point (0 to 1), got {grey.dtype}")


def crop_video(
    video: Tensor,  # [N, T, H, W] uint8
    crop_pixels: int,
    out_pixels: int,
    *,
    rows: Tensor | None = None,  # [N] first row of each clip's crop
    columns: Tensor | None = None,  # [N] first column
    flips: Tensor | None = None,  # [N] bool: mirror this clip
) -> Tensor:
    """Square crops as luma from 0 to 1, reduced by block means: [N, T, out, out] float32; the centre by default.

    Args:
        video: [N, T, H, W] uint8 luma as it is stored, 16 black to 235 white; see grey_to_luma for other pixels.
        crop_pixels: side of the square that is cut.
        out_pixels: side of the result; a divisor of crop_pixels.
        rows: [N] integers, the first row of each clip's square; None: the middle.
        columns: [N] integers, its first column; None: the middle.
        flips: [N] bool, which clips are mirrored; None: none.
    """
    check_pictures(video, crop_pixels, out_pixels)
    height, width = video.shape[2:]
    for name, starts, size in (("rows", rows, height), ("columns", columns, width)):
        if starts is not None:
            check_starts(name, starts, len(video), size - crop_pixels)
    if flips is not None:
        check_flips(flips, len(video))

    def a_clip(given: Tensor | None, default: int | bool) -> Tensor:
        return torch.full((len(video),), default, device=video.device) if given is None else given

    rows, columns = a_clip(rows, (height - crop_pixels) // 2), a_clip(columns, (width - crop_pixels) // 2)
    return crop_luma(video, crop_pixels, out_pixels, rows, columns, a_clip(flips, False))


def augment_video(
    video: Tensor,  # [N, T, H, W] uint8
    crop_pixels: int,
    out_pixels: int,
    config: AugmentConfig,
    generator: torch.Generator,
    *,
    backend: str = "auto",
) -> Tensor:
    """Random crop, mirroring, gamma, contrast, brightness, noise and time mask: [N, T, out, out] luma, about 0 to 1.

    Args:
        backend: "eager" does one thing after the other, the definition; "fused" compiles all of it into one pass over
            the pixels (two with a time mask, whose mean must be known first); "auto": fused on CUDA, else eager.
    """
    check_choice("backend", backend, ("auto", "eager", "fused"))
    check_pictures(video, crop_pixels, out_pixels)
    _check_draws(config, generator)
    draws = draw_variations(video.shape, crop_pixels, config, generator, video.device)
    if backend == "fused" or (backend == "auto" and video.is_cuda and can_fuse()):
        return vary_fused(video, draws, crop_pixels, out_pixels)
    return vary(video, draws, crop_pixels, out_pixels)


def _check_draws(config: AugmentConfig, generator: torch.Generator) -> None:
    if not isinstance(config, AugmentConfig):
        raise TypeError(f"config must be an AugmentConfig, got {type(config).__name__}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")


def _check_log_mel(log_mel: Tensor) -> None:
    check_tensor("log_mel", log_mel)
    if not log_mel.is_floating_point():
        raise TypeError(f"log_mel must be floating point, got {log_mel.dtype}")
    if log_mel.ndim != 3 or 0 in log_mel.shape:
        raise ValueError(f"log_mel must be [N, F, B], not empty; got {list(log_mel.shape)}")


def _uniform(low: float, high: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """[N, 1, ...] uniform draws that broadcast over `like` [N, ...]."""
    return uniform(len(like), low, high, generator, like.device).view(-1, *[1] * (like.ndim - 1))


def augment_log_mel(
    log_mel: Tensor,  # [N, F, B] natural logarithm of mel power
    config: AugmentConfig,
    generator: torch.Generator,
) -> Tensor:
    """Circular shift, noise floor and band mask: [N, F, B]."""
    _check_log_mel(log_mel)
    _check_draws(config, generator)
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
        mask = span_mask(count, bands, config.mel_mask_bands, generator, device)
        log_mel = torch.where(mask[:, None, :], log_mel.mean((1, 2), keepdim=True), log_mel)
    return log_mel
