"""Augmentation of pictures and sound, each clip with draws of its own.

Every function takes the generator its draws come from; the same seed gives the same variations on every device. With a
ClipGenerator (see avppc/draws.py) a clip's draws are tied to its place in the whole batch.

Of the pictures' variation `vary` is the definition, in plain torch; `vary_fused` is the same compiled into one pass:
each output pixel reads its bytes, is mirrored, scaled and varied in registers and written once, where the steps one by
one write every intermediate picture to memory.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from avppc.checks import check_choice, check_integer, check_tensor, dtype_name
from avppc.clip import LUMA_BLACK, LUMA_WHITE
from avppc.data.config import AugmentConfig
from avppc.draws import integers, keys, noise, noise_of, uniform
from avppc.ops.clips import crop_luma

_DARKEST = 1e-3  # luma below which gamma has no hold


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
    _check_pictures(video, crop_pixels, out_pixels)
    height, width = video.shape[2:]
    for name, starts, size in (("rows", rows, height), ("columns", columns, width)):
        if starts is None:
            continue
        _check_per_clip(name, starts, len(video), torch.int64)
        # On a GPU the values are not looked at: that would wait for the device.
        if starts.device.type == "cpu" and not 0 <= int(starts.min()) <= int(starts.max()) <= size - crop_pixels:
            found = f"{int(starts.min())} to {int(starts.max())}"
            raise ValueError(f"{name} must be from 0 to {size - crop_pixels}, got {found}")
    if flips is not None:
        _check_per_clip("flips", flips, len(video), torch.bool)

    def per_clip(given: Tensor | None, default: int | bool) -> Tensor:
        return torch.full((len(video),), default, device=video.device) if given is None else given

    rows, columns = per_clip(rows, (height - crop_pixels) // 2), per_clip(columns, (width - crop_pixels) // 2)
    return crop_luma(video, crop_pixels, out_pixels, rows, columns, per_clip(flips, False))


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
    _check_pictures(video, crop_pixels, out_pixels)
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
    return _per_clip(uniform(len(like), low, high, generator, like.device), like)


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


@dataclass(frozen=True, eq=False)
class Variations:
    """What was drawn for the clips of a batch, on the device of its pictures."""

    rows: Tensor
    """[N] int64 first row of each crop."""
    columns: Tensor
    """[N] int64 first column."""
    flips: Tensor
    """[N] bool: mirrored."""
    gamma: Tensor | None
    """[N] exponent, or None where all are 1."""
    contrast: Tensor | None
    """[N] factor around 0.5."""
    brightness: Tensor | None
    """[N] added to the luma."""
    noise: Tensor | None
    """[N] standard deviation of the noise added."""
    noise_keys: Tensor | None
    """[N] int64: pixels get their noise from this and their place alone."""
    masked: Tensor | None
    """[N, T] bool: frames replaced by the clip's mean frame."""


def draw_variations(
    shape: torch.Size,  # of the video, [N, T, H, W]
    crop_pixels: int,
    config: AugmentConfig,
    generator: torch.Generator,
    device: torch.device,
) -> Variations:
    """Draws how each clip is varied, in a fixed order; what the settings turn off draws nothing."""
    count, frames, height, width = shape
    _check_fits(crop_pixels, height, width)

    def draw(low: float, high: float) -> Tensor:
        return uniform(count, low, high, generator, device)

    def draw_start(size: int) -> Tensor:
        centre, shift = (size - crop_pixels) // 2, config.shift_pixels
        return integers(count, max(0, centre - shift), min(size - crop_pixels, centre + shift), generator, device)

    rows, columns, flips = draw_start(height), draw_start(width), draw(0.0, 1.0) < config.flip_probability
    gamma = contrast = brightness = noise = noise_keys = masked = None
    if config.gamma_range:
        bound = math.log(1.0 + config.gamma_range)
        gamma = draw(-bound, bound).exp()
    if config.contrast_range:
        contrast = draw(1 - config.contrast_range, 1 + config.contrast_range)
    if config.brightness_range:
        brightness = draw(-config.brightness_range, config.brightness_range)
    if config.pixel_noise:
        noise = draw(0.0, config.pixel_noise)
        noise_keys = keys(count, generator, device)
    if config.time_mask_frames:
        masked = span_mask(count, frames, config.time_mask_frames, generator, device)
    return Variations(rows, columns, flips, gamma, contrast, brightness, noise, noise_keys, masked)


def _check_pictures(video: Tensor, crop_pixels: int, out_pixels: int) -> None:
    """Raises TypeError or ValueError unless video is [N, T, H, W] uint8 from which such crops can be cut."""
    check_tensor("video", video)
    if video.dtype != torch.uint8:
        raise TypeError(f"video must be uint8, got {video.dtype}")
    if video.ndim != 4 or 0 in video.shape:
        raise ValueError(f"video must be [N, T, H, W], not empty; got {list(video.shape)}")
    _check_fits(crop_pixels, *video.shape[2:])
    check_integer("out_pixels", out_pixels, 1, crop_pixels)
    if crop_pixels % out_pixels:
        raise ValueError(f"out_pixels must divide crop_pixels={crop_pixels}, got {out_pixels}")


def _check_fits(crop_pixels: int, height: int, width: int) -> None:
    """ValueError where a crop is larger than the picture."""
    check_integer("crop_pixels", crop_pixels, 1)
    if crop_pixels > min(height, width):
        raise ValueError(
            f"crop_pixels must be at most {min(height, width)} for {height} x {width} video, got {crop_pixels}"
        )


def _check_per_clip(name: str, values: Tensor, count: int, dtype: torch.dtype) -> None:
    """Raises TypeError unless values are [count] of a dtype."""
    check_tensor(name, values)
    if values.dtype != dtype or values.shape != (count,):
        wanted = dtype_name(dtype)
        raise TypeError(f"{name} must be [{count}] {wanted}, got {values.dtype} {list(values.shape)}")


def vary(
    video: Tensor,  # [N, T, H, W] uint8
    draws: Variations,
    crop_pixels: int,
    out_pixels: int,
) -> Tensor:
    """The definition: crop, mirror, block means, gamma, contrast, brightness, noise, time mask; [N, T, out, out]."""
    return _vary_luma(crop_luma(video, crop_pixels, out_pixels, draws.rows, draws.columns, draws.flips), draws)


def _vary_luma(luma: Tensor, draws: Variations) -> Tensor:
    """Gamma, contrast, brightness, noise and time mask of pictures [N, T, out, out] float32."""
    if draws.gamma is not None:
        luma = luma.clamp_min(_DARKEST) ** _per_clip(draws.gamma, luma)
    if draws.contrast is not None:
        luma = (luma - 0.5) * _per_clip(draws.contrast, luma) + 0.5
    if draws.brightness is not None:
        luma = luma + _per_clip(draws.brightness, luma)
    if draws.noise is not None:
        assert draws.noise_keys is not None
        luma = luma + _per_clip(draws.noise, luma) * noise_of(draws.noise_keys, luma.shape)
    if draws.masked is not None:
        luma = torch.where(draws.masked[:, :, None, None], luma.mean(1, keepdim=True), luma)
    return luma


def vary_fused(video: Tensor, draws: Variations, crop_pixels: int, out_pixels: int) -> Tensor:
    """The same as `vary`, compiled: equal but for the rounding of float32.

    Raises:
        RuntimeError: there is nothing to compile with: Triton on CUDA, a C++ compiler on the CPU.
    """
    return _compiled()(video, draws, crop_pixels, out_pixels)


@functools.cache
def can_fuse() -> bool:
    """Whether the compiler's backend for CUDA is there."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_one_pass, fullgraph=True, dynamic=True)


def _one_pass(
    video: Tensor,  # [N, T, H, W] uint8
    draws: Variations,
    crop: int,
    out: int,
) -> Tensor:
    """`vary` as index arithmetic and pointwise steps, which the compiler makes one kernel of."""
    count, frames = video.shape[:2]
    block = crop // out
    steps = torch.arange(crop, device=video.device)
    down = draws.rows[:, None] + steps  # [N, crop]
    across = draws.columns[:, None] + torch.where(draws.flips[:, None], crop - 1 - steps, steps)
    clips = torch.arange(count, device=video.device)[:, None, None, None]
    times = torch.arange(frames, device=video.device)[None, :, None, None]
    pixels = video[clips, times, down[:, None, :, None], across[:, None, None, :]].to(torch.float32)
    luma = pixels.view(count, frames, out, block, out, block).sum((3, 5)) * (1.0 / (255.0 * block * block))
    return _vary_luma(luma, draws)


def _per_clip(values: Tensor, like: Tensor) -> Tensor:
    """One value a clip, [N], as [N, 1, ...], which broadcasts over `like` [N, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def span_mask(count: int, size: int, longest: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """[N, size] bool: one span of 0 to `longest` places a row, anywhere in it."""
    lengths = integers(count, 0, min(longest, size), generator, device)
    starts = integers(count, 0, size - lengths, generator, device)
    places = torch.arange(size, device=device)
    return (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
