"""Other ways to decode clips: what they give of the tests' videos, and what a project without ours would write."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch

from avppc.clip import CLIP_SAMPLES, LRW_COLUMNS, LRW_ROWS
from avppc.data.on_the_fly.dali import DaliLoader, load_dali
from avppc.data.on_the_fly.videos import first_clips
from avppc.data.packed.loader import EpochSampler
from avppc.data.scan import scan
from avppc.data.video.crop import Crop
from avppc.data.video.decode import decode_clip
from avppc.data.video.picked import load_torchcodec

WINDOW = (slice(*LRW_ROWS), slice(*LRW_COLUMNS))


def bare_decode(path: str) -> tuple[np.ndarray, np.ndarray]:
    """The least that gives crop and 16 kHz sound with PyAV: no checks, no clock, one thread."""
    images, sound = [], []
    with av.open(path) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        for stream in (video, audio):
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
        resampler = av.AudioResampler(format="s16", layout="mono", rate=16_000)
        for packet in container.demux(video, audio):
            for frame in packet.decode():
                if isinstance(frame, av.VideoFrame):
                    plane = frame.planes[0]
                    luma = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
                    images.append(luma[WINDOW].copy())
                else:
                    sound += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        sound += [part.to_ndarray()[0] for part in resampler.resample(None)]
    return np.stack(images), np.concatenate(sound)[:CLIP_SAMPLES]


def bare_torchcodec(path: str) -> tuple[np.ndarray, np.ndarray]:
    """All frames, red only, and the sound; no checks."""
    decoders = load_torchcodec()
    frames = decoders.VideoDecoder(path, num_ffmpeg_threads=1, seek_mode="approximate").get_all_frames()
    sound = decoders.AudioDecoder(path, sample_rate=16_000, num_channels=1).get_all_samples()
    return frames.data[:, 0, WINDOW[0], WINDOW[1]].numpy(), sound.data[0, :CLIP_SAMPLES].numpy()


def bare_decord(path: str) -> tuple[np.ndarray, np.ndarray]:
    """All frames, red only, and the sound; no checks."""
    import decord

    frames = decord.VideoReader(path, num_threads=1)[:].asnumpy()
    sound = decord.AudioReader(path, sample_rate=16_000, mono=True)[:].asnumpy()
    return frames[:, WINDOW[0], WINDOW[1], 0], sound[0, :CLIP_SAMPLES]


def decoders() -> dict[str, Callable[[str], object]]:
    """Each way to decode one clip that works here."""
    found: dict[str, Callable[[str], object]] = {"ours_pyav": decode_clip, "bare_pyav": bare_decode}
    try:
        load_torchcodec()
    except ImportError:
        pass
    else:
        found["ours_torchcodec"] = functools.partial(decode_clip, backend="torchcodec")
        found["bare_torchcodec"] = bare_torchcodec
    if importlib.util.find_spec("decord") is not None:
        found["bare_decord"] = bare_decord
    return found


def dali_loader(folder: Path, batch: int, crop: Crop) -> DaliLoader | None:
    """DALI on the videos of a folder, on the GPU where there is one; None where it is not installed."""
    try:
        load_dali()
    except ImportError:
        return None
    clips = first_clips(folder, scan(folder).videos)
    device = 0 if torch.cuda.is_available() else None
    sampler = EpochSampler(len(clips), batch, seed=0)
    return DaliLoader(clips, sampler, device_id=device, crop=crop, workers=2, threads=2)
