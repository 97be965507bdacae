"""What training first does to a batch of clips: it cuts spans out, crops the luma, and computes motion from the luma.

Each operator has its definition in plain torch beside it, which runs on every device. On a CPU torch would go clip by
clip, or write all pictures anew for each step; there compiled operators take its place. Their spans and crops have the
same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from avppc.ops import _library
from avppc.ops.modes import is_differentiated, is_plain


def cut_spans(clips: Tensor, starts: Tensor, length: int) -> Tensor:
    """Spans [R, length, ...] of clips [N, T, ...]: span r is cut from clip r % N, from step starts[r] on.

    Args:
        clips: [N, T, ...] of any dtype; differentiable.
        starts: [R] int64 from 0 to T - length, R a multiple of N; not checked on a GPU.
        length: steps of each span, 1 to T.
    """
    if clips.device.type == "cpu" and _library.has_cpp_ops() and not is_differentiated(clips):
        spans: Tensor = torch.ops.avppc.cut_spans(clips.contiguous(), starts.cpu().contiguous(), length)
        return spans
    return cut_spans_reference(clips, starts, length)


def cut_spans_reference(clips: Tensor, starts: Tensor, length: int) -> Tensor:
    """The definition of cut_spans."""
    device = clips.device
    numbers = torch.arange(len(starts), device=device)[:, None] % len(clips)
    return clips[numbers, starts.to(device)[:, None] + torch.arange(length, device=device)]


def crop_luma(video: Tensor, crop_pixels: int, out_pixels: int, rows: Tensor, columns: Tensor, flips: Tensor) -> Tensor:
    """Square crops as luma from 0 to 1, reduced by block means: [N, T, out, out] float32.

    Args:
        video: [N, T, H, W] uint8.
        crop_pixels: side of the square.
        out_pixels: side of the result, a divisor of crop_pixels.
        rows: [N] int64, first row of each clip's square, 0 to H - crop_pixels.
        columns: [N] int64, its first column.
        flips: [N] bool, which are mirrored left and right.
    """
    if video.device.type == "cpu" and _library.has_cpp_ops():
        video = video if video.stride(3) == 1 else video.contiguous()
        places = rows.cpu().contiguous(), columns.cpu().contiguous(), flips.cpu().contiguous()
        luma: Tensor = torch.ops.avppc.crop_luma(video, *places, crop_pixels, out_pixels)
        return luma
    return crop_luma_reference(video, crop_pixels, out_pixels, rows, columns, flips)


def crop_luma_reference(
    video: Tensor, crop_pixels: int, out_pixels: int, rows: Tensor, columns: Tensor, flips: Tensor
) -> Tensor:
    """The definition of crop_luma: the sum of a block's pixels, which float32 holds exactly, divided once."""
    device, block = video.device, crop_pixels // out_pixels
    steps = torch.arange(crop_pixels, device=device)
    across = torch.where(flips.to(device)[:, None], steps.flip(0), steps) + columns.to(device)[:, None]
    down = rows.to(device)[:, None] + steps
    clips = torch.arange(len(video), device=device)[:, None, None]
    crops = video[clips, :, down[:, :, None], across[:, None, :]].movedim(3, 1).to(torch.float32)
    if block > 1:
        crops = functional.avg_pool2d(crops, block, divisor_override=1)
    return crops / (255.0 * block * block)


def motion_frames(video: Tensor, stride: int = 1, phase: int = 0) -> Tensor:
    """Motion and picture of every stride-th frame: [N, T, H, W] luma -> [N T', 4, H, W], in memory channels last.

    The channels are the motion of the previous frame, of this one and of the next (at the ends of the clip, this one's
    again), and the frame less its mean, divided by its deviation. Motion is the frame less the mean of the T given
    frames, divided by its deviation over the clip: what does not move (who speaks, how it is lit) is gone. Only the
    given frames enter, so nothing leaks into a cut element.

    Args:
        video: [N, T, H, W] floating point luma, 0 to 1.
        stride: every how many frames a result is given; motion is taken at the full rate.
        phase: the first frame that has a result.
    """
    if _has_float_values(video) and _library.has_cpp_ops():
        channels: Tensor = torch.ops.avppc.motion_frames(video.contiguous(), stride, phase)
        return channels.permute(0, 3, 1, 2)
    return motion_frames_reference(video, stride, phase)


def motion_frames_reference(video: Tensor, stride: int = 1, phase: int = 0) -> Tensor:
    """The definition of motion_frames."""
    motion = video - video.mean(1, keepdim=True)
    # Centred in time, so its mean is 0 and its deviation the root of the mean square.
    motion = motion / (_root(motion.square().mean((1, 2, 3), keepdim=True)) + 0.02)
    padded = torch.cat([motion[:, :1], motion, motion[:, -1:]], 1)
    centred = video - video.mean((2, 3), keepdim=True)
    still = centred / (_root(centred.square().mean((2, 3), keepdim=True)) + 1e-3)
    channels = torch.stack([padded[:, :-2], padded[:, 1:-1], padded[:, 2:], still], 2)
    return channels[:, phase::stride].flatten(0, 1).contiguous(memory_format=torch.channels_last)


def local_motion_frames(video: Tensor, reach: int, stride: int = 1, phase: int = 0) -> Tensor:
    """As motion_frames, [N, T, H, W] luma -> [N T', 4, H, W], but each frame depends on those around it alone.

    Motion is the frame less the mean of the frames up to `reach` before and after the one that the result is of (as far
    as the clip goes), divided by that one's deviation over its pixels, four times as large: neighbours differ little.
    So what is computed from a clip holds for every part of it that has these frames.

    Args:
        video: [N, T, H, W] floating point luma, 0 to 1.
        reach: frames before and after its own that a result depends on, at least 1.
        stride: every how many frames a result is given; motion is taken at the full rate.
        phase: the first frame that has a result.
    """
    if _has_float_values(video) and _library.has_cpp_ops():
        channels: Tensor = torch.ops.avppc.local_motion_frames(video.contiguous(), reach, stride, phase)
        return channels.permute(0, 3, 1, 2)
    return local_motion_frames_reference(video, reach, stride, phase)


def local_motion_frames_reference(video: Tensor, reach: int, stride: int = 1, phase: int = 0) -> Tensor:
    """The definition of local_motion_frames."""
    frames = video.shape[1]
    around = functional.pad(video, (0, 0, 0, 0, reach, reach))  # black beyond the ends, which are not counted
    sums = torch.stack([around[:, first : first + frames] for first in range(2 * reach + 1)]).sum(0)
    places = torch.arange(frames, device=video.device)
    counts = places.flip(0).clamp_max(reach) + places.clamp_max(reach) + 1
    means = sums / counts.to(video.dtype)[:, None, None]
    padded = torch.cat([video[:, :1], video, video[:, -1:]], 1)
    centred = video - video.mean((2, 3), keepdim=True)
    contrast = _root(centred.square().mean((2, 3), keepdim=True))
    motion = [(frame - means) * 4 / (contrast + 0.02) for frame in (padded[:, :-2], video, padded[:, 2:])]
    channels = torch.stack([*motion, centred / (contrast + 1e-3)], 2)
    return channels[:, phase::stride].flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _root(square: Tensor) -> Tensor:
    """The root of a number >= 0, with gradient 0 at 0, so that a still clip and a frame of one grey have a gradient."""
    return square.clamp_min(1e-30).sqrt()


def _has_float_values(video: Tensor) -> bool:
    """Whether these are float32 numbers on the CPU, neither differentiated nor traced."""
    return (
        video.device.type == "cpu" and video.dtype == torch.float32 and is_plain(video) and not is_differentiated(video)
    )


def _cut_spans_fake(clips: Tensor, starts: Tensor, length: int) -> Tensor:
    return clips.new_empty((starts.shape[0], length, *clips.shape[2:]))


def _crop_luma_fake(video: Tensor, rows: Tensor, columns: Tensor, flips: Tensor, crop: int, side: int) -> Tensor:
    return video.new_empty((*video.shape[:2], side, side), dtype=torch.float32)


def _motion_frames_fake(video: Tensor, stride: int, phase: int) -> Tensor:
    count, frames, height, width = video.shape
    return video.new_empty((count * ((frames - phase + stride - 1) // stride), height, width, 4))


def _local_motion_frames_fake(video: Tensor, reach: int, stride: int, phase: int) -> Tensor:
    return _motion_frames_fake(video, stride, phase)


if _library.has_cpp_ops():
    torch.library.register_fake("avppc::motion_frames", _motion_frames_fake)
    torch.library.register_fake("avppc::local_motion_frames", _local_motion_frames_fake)
    torch.library.register_fake("avppc::cut_spans", _cut_spans_fake)
    torch.library.register_fake("avppc::crop_luma", _crop_luma_fake)
