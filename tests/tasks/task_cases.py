"""Batches and settings for the tests of the proxy tasks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from avppc import ClipBatch
from avppc.clip import CLIP_FRAMES, CLIP_SAMPLES, SAMPLES_PER_FRAME
from avppc.config import AugmentConfig, BaselineConfig, EncoderConfig, ObjectiveConfig, PretrainConfig

CONFIG = PretrainConfig(
    Path("data"),
    Path("out"),
    objective=ObjectiveConfig(dim=16),
    encoder=EncoderConfig(width=4, features=16),
    audio_width=4,
)
# What each clip shows and sounds is not varied: only what the task itself does to it is left.
PLAIN = AugmentConfig(shift_pixels=0, flip_probability=0.0, mel_shift_frames=0, mel_noise_floor=False, mel_mask_bands=0)


def make_config(task: str, **changes: object) -> PretrainConfig:
    """Tiny settings of a task; `baselines` and `objective` as dicts of what differs."""
    for name, of in (("baselines", BaselineConfig), ("objective", ObjectiveConfig)):
        if name in changes:
            first = {"dim": 16} if name == "objective" else {}
            changes[name] = of(**{**first, **changes[name]})
    return dataclasses.replace(CONFIG, task=task, **changes)


def make_batch(clips: int = 6, seed: int = 0) -> ClipBatch:
    """Noise, seen and heard."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.arange(clips)
    return ClipBatch(
        torch.randint(0, 256, (clips, CLIP_FRAMES, 96, 96), generator=generator, dtype=torch.uint8),
        torch.randint(-9000, 9000, (clips, CLIP_SAMPLES), generator=generator, dtype=torch.int16),
        numbers % 3,
        numbers,
        torch.zeros_like(numbers),
    )


def make_numbered_batch(clips: int = 5) -> ClipBatch:
    """Every pixel and sample tells its clip and frame: 32 * clip + frame."""
    numbers = torch.arange(clips)
    frames = 32 * numbers[:, None] + torch.arange(CLIP_FRAMES)
    return ClipBatch(
        frames.to(torch.uint8)[:, :, None, None].expand(-1, -1, 96, 96).contiguous(),
        frames.to(torch.int16).repeat_interleave(SAMPLES_PER_FRAME, 1),
        numbers,
        numbers,
        numbers,
    )


def make_opening_mouths(clips: int, seed: int) -> ClipBatch:
    """A dark square that opens slowly and shuts fast, and a tone as loud as it is open; each at its own moment."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.randint(150, 200, (clips, CLIP_FRAMES, 96, 96), generator=generator, dtype=torch.uint8)
    time = torch.arange(CLIP_FRAMES) / CLIP_FRAMES
    phase = torch.rand(clips, 1, generator=generator)
    opening = ((time + phase) * 2) % 1  # a saw tooth
    noise = torch.randn(clips, CLIP_SAMPLES, generator=generator)
    audio = (300 + 6000 * opening.repeat_interleave(SAMPLES_PER_FRAME, 1)) * noise
    for clip in range(clips):
        for frame in range(CLIP_FRAMES):
            half = int(2 + 16 * opening[clip, frame])
            video[clip, frame, 48 - half : 48 + half, 30:66] = 20
    numbers = torch.arange(clips)
    return ClipBatch(video, audio.clamp(-32000, 32000).to(torch.int16), numbers * 0, numbers, numbers)
