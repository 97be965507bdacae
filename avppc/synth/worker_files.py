"""Files of a clip: the video, its text and its true mouth, each written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from avppc.clip import CLIP_FRAMES, SAMPLE_RATE_HZ, VIDEO_FPS
from avppc.synth.clip import MadeClip

# The fastest preset: 11 ms a clip against 26 for "veryfast" at the same error in the mouth crop, 20 KiB against 7.
_VIDEO_OPTIONS = {"preset": "ultrafast", "crf": "24", "threads": "1"}
_AUDIO_OPTIONS = {"aac_coder": "fast"}
_AUDIO_BITS_A_SECOND = 48_000


def _write(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and puts it in place: a killed run leaves all of it or nothing.

    Not synced to the disk: a power cut may tear it, and the checksum in the manifest tells.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_clip(root: Path, stem: str, clip: MadeClip) -> str:
    """Writes STEM.npy, STEM.txt and last STEM.mp4; returns the video's SHA-256."""
    base = root / stem
    base.parent.mkdir(parents=True, exist_ok=True)
    video = encode_mp4(clip.frames, clip.audio)
    mouth = io.BytesIO()
    np.save(mouth, clip.mouth, allow_pickle=False)
    _write(base.with_suffix(".npy"), mouth.getvalue())
    _write(base.with_suffix(".txt"), _text(stem, clip).encode())
    _write(base.with_suffix(".mp4"), video)
    return hashlib.sha256(video).hexdigest()


def _text(stem: str, clip: MadeClip) -> str:
    """The five lines that LRW keeps beside a clip; unlabelled clips have the duration of the clip."""
    start = clip.facts["word_start_seconds"]
    return (
        f"Disk reference: {stem}\n"
        "Channel: avppc talking mouths\n"
        f"Text: {clip.facts['text']}\n"
        f"Clip start: {0.0 if start is None else -start:.2f} seconds\n"
        f"Duration: {CLIP_FRAMES / VIDEO_FPS if clip.word_seconds is None else clip.word_seconds:.2f} seconds\n"
    )


def encode_mp4(
    frames: NDArray[np.uint8],  # [T, 384, 256] I420
    audio: NDArray[np.float32],  # [S] at 16 kHz
) -> bytes:
    """H.264 and AAC in an MP4 file, 25 frames a second."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        video_stream = container.add_stream("libx264", rate=VIDEO_FPS, options=_VIDEO_OPTIONS)
        video_stream.height, video_stream.width = frames.shape[1] * 2 // 3, frames.shape[2]
        video_stream.pix_fmt = "yuv420p"
        audio_stream = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono", options=_AUDIO_OPTIONS)
        audio_stream.bit_rate = _AUDIO_BITS_A_SECOND
        for planes in frames:
            container.mux(video_stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(video_stream.encode())
        sound = av.AudioFrame.from_ndarray(audio[None], format="fltp", layout="mono")
        sound.sample_rate = SAMPLE_RATE_HZ
        sound.pts, sound.time_base = 0, Fraction(1, SAMPLE_RATE_HZ)
        container.mux(audio_stream.encode(sound))
        container.mux(audio_stream.encode())
    return file.getvalue()
