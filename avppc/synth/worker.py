"""A worker process: makes clips one after the other and ends with the process that started it.

The files of a clip are the video, its text and its true mouth, each written whole or not at all; a contact sheet shows
the clips of a data set, a row each, its frames from left to right.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from avppc.checks import check_integer
from avppc.clip import CLIP_FRAMES, CROP_SIZE, LRW_COLUMNS, LRW_ROWS, SAMPLE_RATE_HZ, VIDEO_FPS
from avppc.data import contact_sheet
from avppc.data.contact_sheet import spread, strip
from avppc.files import name_in_errors, read_bytes
from avppc.processes import follow_parent
from avppc.synth.clip import Job, MadeClip, make_clip
from avppc.synth.config import DIFFICULTIES, WORDS, SynthConfig
from avppc.synth.speaker import Cast
from avppc.synth.voice import Espeak

# The fastest preset: 11 ms a clip against 26 for "veryfast" at the same error in the mouth crop, 20 KiB against 7.
_VIDEO_OPTIONS = {"preset": "ultrafast", "crf": "24", "threads": "1"}
_AUDIO_OPTIONS = {"aac_coder": "fast"}
_AUDIO_BITS_A_SECOND = 48_000


@dataclass(frozen=True)
class _Workshop:
    """What a worker process sets up once, for all the clips that it makes."""

    config: SynthConfig
    cast: Cast
    espeak: Espeak


_config: SynthConfig | None = None
_workshop: _Workshop | None = None


def start_worker(config: SynthConfig) -> None:
    """Prepares this process; call once before make_and_write."""
    global _config
    follow_parent()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    _config = config


def make_and_write(job: Job) -> dict[str, Any]:
    """Makes a clip and its files; returns its line of the manifest."""
    global _workshop
    assert _config is not None, "start_worker comes first"
    if _workshop is None:  # made here: an error of a process's start would reach nobody
        _workshop = _Workshop(_config, Cast(_config, DIFFICULTIES[_config.difficulty].identity), Espeak())
    config, cast = _workshop.config, _workshop.cast
    speaker = cast.speaker(job.split, job.draw_speaker(config.seed, cast.sizes[job.split]))
    clip = make_clip(
        job,
        speaker,
        DIFFICULTIES[config.difficulty],
        _workshop.espeak,
        seed=config.seed,
        free_words=WORDS[config.words :],
        look=config.look,
    )
    checksum = write_clip(config.out, job.stem, clip)
    return {
        "path": f"{job.stem}.mp4",
        "word": job.word,
        "split": job.split,
        "speaker": speaker.number,
        "face": speaker.face_number,
        "voice": speaker.voice.name,
        "sha256": checksum,
        "seed": job.entropy(config.seed),
        **clip.facts,
    }


def write_contact_sheet(
    root: Path, path: Path, names: Sequence[str] = (), *, clips: int = 10, frames: int = 15, faces: int = 2
) -> None:
    """Writes a PNG: of clips spread over the data set, whole faces, then mouth crops of frames spread over the clip.

    Args:
        root: folder of the data set.
        path: of the PNG file.
        names: the videos, as paths below root; none: every .mp4 there.
        clips: rows, 1 to 10,000.
        frames: mouth crops a row, 1 to 29.
        faces: whole faces before them, 0 to 29.

    Raises:
        TypeError, ValueError: an argument is no integer or out of range, or there is no .mp4 below root.
    """
    check_integer("clips", clips, 1, 10_000)
    check_integer("frames", frames, 1, CLIP_FRAMES)
    check_integer("faces", faces, 0, CLIP_FRAMES)
    videos = sorted(root / name for name in names) or sorted(root.rglob("*.mp4"))
    if not videos:
        raise ValueError(f"root must hold .mp4 files, found none in {root}")
    chosen = [videos[number] for number in spread(len(videos), clips)]
    strips = [(str(video.relative_to(root)), _strip(_decode(video), frames, faces)) for video in chosen]
    contact_sheet.write_contact_sheet(path, strips)


def _strip(
    images: NDArray[np.uint8],  # [T, 256, 256, 3]
    frames: int,
    faces: int,
) -> NDArray[np.uint8]:  # [96, (faces + frames) * 96, 3]
    """Whole faces, then mouth crops."""
    whole = [
        np.asarray(cv2.resize(images[number], (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_AREA), np.uint8)
        for number in np.linspace(0, len(images) - 1, faces + 2).astype(int)[1:-1]
    ]
    rows, columns = slice(*LRW_ROWS), slice(*LRW_COLUMNS)
    mouths = [images[number, rows, columns] for number in np.linspace(0, len(images) - 1, frames).astype(int)]
    return strip([*whole, *mouths])


def _decode(video: Path) -> NDArray[np.uint8]:
    with av.open(io.BytesIO(read_bytes(video)), "r") as container:  # the decoder does not say that a disk fails
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(np.uint8)


def _write(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and puts it in place: a killed process leaves all of it or nothing.

    Not synced to the disk: a power cut may tear it, and the checksum in the manifest tells.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with name_in_errors(path, temporary):
            temporary.write_bytes(content)
            os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


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
