"""Decodes clips with torchcodec: the same cut by time stamps as PyAV's, by another decoder.

torchcodec gives colours: the luma is computed back from them, in video range, so it differs from the stored one by what
the two roundings lose. It needs FFmpeg's shared libraries and a build for the installed torch.
"""

from __future__ import annotations

import functools
import io
import os
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avppc.clip import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, VIDEO_FPS
from avppc.data.clock import converted_rate
from avppc.data.crop import LUMA_WEIGHTS, Crop
from avppc.data.decode import DecodeError, Source, check_container, damage_as_decode_error
from avppc.data.reader import DecodedClip, missing_sound
from avppc.errors import one_line

_TIE_SECONDS = 1e-5  # of two frames equally near, the earlier one is taken


@functools.cache
def load_torchcodec() -> Any:
    """torchcodec.decoders; ImportError that says what it lacks where it cannot be loaded."""
    try:
        import torchcodec.decoders as decoders
    except (ImportError, OSError, RuntimeError) as error:
        cause = error.__cause__
        detail = one_line(error) + (f" ({cause})" if cause is not None else "")
        raise ImportError(
            "backend 'torchcodec' cannot be loaded: pip install 'avppc[codec]', in a version built for torch "
            f"{torch.__version__} and with FFmpeg's shared libraries where the system finds them; it says: {detail}"
        ) from error
    return decoders


def decode_clip_torchcodec(source: Source, start_frame: int, num_frames: int, crop: Crop) -> DecodedClip:
    """One clip, as decode_clip gives it.

    Raises:
        ImportError: torchcodec cannot be loaded.
        DecodeError: as for decode_clip; also for crops that follow the mouth, which PyAV does.
    """
    decoders = load_torchcodec()
    with damage_as_decode_error(source) as name:
        if crop.track is not None:
            raise DecodeError(name, "torchcodec does not follow mouths: decode it with PyAV")
        readable = source if isinstance(source, bytes) else os.fspath(source)
        if not readable or (isinstance(readable, str) and os.stat(readable).st_size == 0):
            raise DecodeError(name, "the file is empty")
        ignored = check_container(source)
        video = decoders.VideoDecoder(_fresh(readable), num_ffmpeg_threads=1, seek_mode="exact")
        origin = Fraction(video.metadata.begin_stream_seconds_from_content or 0).limit_denominator(1_000_000)
        start = origin + Fraction(start_frame, VIDEO_FPS)
        images, converted = _images(video, name, start, num_frames, crop)
        samples, missing = _sound(
            decoders.AudioDecoder(_fresh(readable), sample_rate=SAMPLE_RATE_HZ, num_channels=1), start, num_frames
        )
        notes = ignored + converted + missing_sound(missing, len(samples))
    return DecodedClip(images, torch.from_numpy(samples), start_frame, tuple(notes))


def _fresh(source: str | bytes) -> str | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _images(video: Any, name: str, start: Fraction, count: int, crop: Crop) -> tuple[Tensor, list[str]]:
    """[T, size, size] uint8: for each instant the frame whose time stamp is nearest."""
    facts = video.metadata
    frame_seconds = 1 / facts.average_fps
    instants = [float(start + Fraction(number, VIDEO_FPS)) for number in range(count)]
    end = facts.end_stream_seconds_from_content
    if instants[-1] > end:
        total = int((end - float(start)) * VIDEO_FPS + 0.5)
        raise DecodeError(name, f"too short: {max(total, 0)} frames of 1/25 s, {count} are needed")
    last = end - _TIE_SECONDS
    # The frame shown half a frame later is the nearest one.
    shown = video.get_frames_played_at([min(t + frame_seconds / 2 - _TIE_SECONDS, last) for t in instants])
    distances = (shown.pts_seconds - torch.tensor(instants, dtype=torch.float64)).abs()
    missing = int((distances >= 1 / VIDEO_FPS).sum())
    if missing:
        raise DecodeError(name, f"frames missing: {missing} of {count}")
    rows, columns = crop.box(*shown.data.shape[2:])
    colours = shown.data[:, :, rows, columns].to(torch.float32)  # [T, 3, h, w]
    luma = torch.einsum("tchw,c->thw", colours, torch.tensor(LUMA_WEIGHTS)) + 16
    images = luma.round().clamp(0, 255).to(torch.uint8).numpy()
    rate = facts.average_fps
    notes = [] if abs(rate - VIDEO_FPS) < 0.01 else [converted_rate(rate)]
    return torch.from_numpy(np.stack([crop.resize(image) for image in images])), notes


def _sound(
    audio: Any, start: Fraction, frames: int
) -> tuple[np.ndarray[Any, np.dtype[np.int16]], list[tuple[int, int]]]:
    """Samples of the clip and the spans that hold none."""
    count = frames * SAMPLES_PER_FRAME
    facts = audio.metadata
    first = max(float(start), facts.begin_stream_seconds or 0.0)
    last = float(start + Fraction(frames, VIDEO_FPS))
    if facts.duration_seconds is not None:
        last = min(last, (facts.begin_stream_seconds or 0.0) + facts.duration_seconds)
    samples = np.zeros(count, np.int16)
    if last <= first:
        return samples, [(0, count)]
    heard = audio.get_samples_played_in_range(first, last)
    wave = (heard.data[0] * 32768).round().clamp(-32768, 32767).to(torch.int16).numpy()
    place = round((heard.pts_seconds - float(start)) * SAMPLE_RATE_HZ)
    wave, place = wave[max(-place, 0) :], max(place, 0)
    wave = wave[: count - place]
    samples[place : place + len(wave)] = wave
    spans = [(0, place), (place + len(wave), count)]
    return samples, [(a, b) for a, b in spans if a < b]
