"""For decoders that give pictures alone (torchcodec, DALI): a clip's sound, and the numbers of its pictures.

And the clips of torchcodec itself. It gives colours: the luma is computed back from them, in video range, so it differs
from the stored one by what the two roundings lose. It needs FFmpeg's shared libraries and a build for the installed
torch.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from avppc.clip import SAMPLES_PER_FRAME, VIDEO_FPS
from avppc.data.video.clock import AudioTimeline, FrameGrid
from avppc.data.video.crop import Crop, Geometry, geometry_of, luma_of
from avppc.data.video.decode import SEEK_BEYOND_FRAMES, TOO_SHORT
from avppc.data.video.pictures import HIDDEN_FRAMES, PacketClock, PictureDecoder, decode_packet, frame_grid
from avppc.data.video.reader import (
    PRE_ROLL_SECONDS,
    DecodedClip,
    all_present,
    choose_streams,
    missing_sound,
    stream_notes,
)
from avppc.data.video.source import DecodeError, Source, check_container, damage_as_decode_error, open_video
from avppc.printing import one_line

_SAME_SECONDS = 1e-3  # time stamps of one picture as two decoders tell them


@dataclass(frozen=True, eq=False)
class SoundAndFrames:
    """A clip without its pictures: its sound, and which pictures of the video are to be decoded."""

    audio: NDArray[np.int16]
    """[640 T] at 16 kHz; sample n belongs to the first frame's time + n / 16000 s."""
    frames: NDArray[np.int32]
    """[T] numbers of the frames of the video, in the order in which they are shown, nearest to each instant."""
    seconds: NDArray[np.float64]
    """[T] their time stamps."""
    height: int
    """Pixels, as stored."""
    width: int
    """Pixels, as stored."""
    geometry: Geometry
    """How the pictures are to be shown."""
    stream: int
    """Index of the video stream in the file."""
    notes: tuple[str, ...]
    """What was converted or filled in, as "kind: details"."""


def read_sound_and_frames(source: Source, start_frame: int, num_frames: int, *, hidden: bool = False) -> SoundAndFrames:
    """Decodes the sound of a clip and picks its pictures by their time stamps, decoding no more than the first of them.

    Args:
        hidden: whether the decoder leaves out, as it should, pictures that an edit list hides.

    Raises:
        DecodeError: as decode_clip, as far as it can be known without decoding pictures; also for files whose pictures
            the decoder counts differently: they are hidden by an edit list, or have no time stamps of their own.
    """
    with damage_as_decode_error(source) as name, open_video(source) as container:
        notes = check_container(source)
        video, audio = choose_streams(container)
        notes += stream_notes(container, video, audio)
        stamps, sounds, geometry = _read_packets(container, video, audio, name, hidden)
        if not stamps or video.time_base is None:
            raise ValueError("the video stream has no pictures")
        origin = stamps[0] * Fraction(video.time_base)
        start, count = start_frame * SAMPLES_PER_FRAME, num_frames * SAMPLES_PER_FRAME
        chosen, rate_notes = _nearest_frames(container, video, stamps, start_frame, num_frames)
        if len(chosen) < num_frames:
            total, needed = start_frame + len(chosen), start_frame + num_frames
            raise DecodeError(name, f"{TOO_SHORT}: {total} frames of 1/25 s, {needed} are needed")
        sound = _decode_sound(sounds, origin, start_frame, num_frames)
        samples, missing = sound.take(start, count)
        notes += missing_sound(missing, count)
        present = all_present(chosen, start_frame)
        times = np.array([float(stamps[number] * video.time_base) for number in present])
        context = video.codec_context
        return SoundAndFrames(
            np.array(samples),
            np.array(present, np.int32),
            times,
            context.height,
            context.width,
            geometry,
            video.index,
            (*notes, *geometry.notes, *rate_notes),
        )


def _read_packets(
    container: InputContainer, video: VideoStream, audio: AudioStream, name: str, hidden: bool
) -> tuple[list[int], list[Packet[Any]], Geometry]:
    """Time stamps of all pictures in the order in which they are shown, the packets of the sound, and how the first
    picture is to be shown."""
    stamps: list[int] = []
    sounds: list[Packet[Any]] = []
    geometry: Geometry | None = None
    clock, decoder = PacketClock(), PictureDecoder(container, video)
    for packet in container.demux(video, audio):
        if packet.stream is audio:
            sounds.append(packet)
            continue
        if geometry is None:
            for picture in decoder.decode(packet)[:1]:
                geometry = geometry_of(picture, video.sample_aspect_ratio)
        stamp = clock.stamp(packet)
        if not packet.size:
            continue
        if packet.is_discard and hidden:
            continue
        if packet.is_discard:
            raise DecodeError(name, f"{HIDDEN_FRAMES}: an edit list leaves some out, decode it with PyAV")
        if stamp is None or (clock.in_order and video.codec_context.has_b_frames):
            raise DecodeError(name, "pictures without time stamps: decode it with PyAV")
        stamps.append(stamp)
    stamps.sort()
    return stamps, sounds, geometry or Geometry()


def _decode_sound(packets: Sequence[Packet[Any]], origin: Fraction, start_frame: int, num_frames: int) -> AudioTimeline:
    """The sound from the start of the file, or from shortly before the clip where that is far away, to its end."""
    first = origin + Fraction(start_frame, VIDEO_FPS) - PRE_ROLL_SECONDS
    last = origin + Fraction(start_frame + num_frames, VIDEO_FPS) + PRE_ROLL_SECONDS
    timeline = AudioTimeline(origin, start_frame * SAMPLES_PER_FRAME)
    for packet in packets:
        if packet.pts is not None and packet.time_base is not None:
            begin = packet.pts * packet.time_base
            if start_frame > SEEK_BEYOND_FRAMES and begin + (packet.duration or 0) * packet.time_base < first:
                continue
            if begin > last:
                break
        for frame in decode_packet(packet):
            assert isinstance(frame, av.AudioFrame)
            timeline.push(frame)
    timeline.finish()
    return timeline


def _nearest_frames(
    container: InputContainer, video: VideoStream, stamps: list[int], start_frame: int, num_frames: int
) -> tuple[list[int | None], list[str]]:
    """Number of the frame of each instant from start_frame on, by the same grid that cuts clips, and notes on it."""
    assert video.time_base is not None
    grid: FrameGrid[int] = frame_grid(container, video.time_base, stamps[0], start_frame)
    chosen: list[int | None] = []
    for number, stamp in enumerate(stamps):
        chosen += grid.push(stamp, number)
        if len(chosen) >= num_frames:
            break
    else:
        chosen += grid.finish()
    return chosen[:num_frames], grid.notes


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
        DecodeError: as for decode_clip; also for crops that follow the mouth, and for files whose pictures torchcodec
            cannot place (they have no time stamps, say): PyAV does both.
    """
    decoders = load_torchcodec()
    with damage_as_decode_error(source) as name:
        if crop.track is not None:
            raise DecodeError(name, "torchcodec does not follow mouths: decode it with PyAV")
        parts = read_sound_and_frames(source, start_frame, num_frames, hidden=True)
        readable = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
        video = decoders.VideoDecoder(
            readable, stream_index=parts.stream, num_ffmpeg_threads=1, seek_mode="exact", dimension_order="NHWC"
        )
        try:
            shown = video.get_frames_at(parts.frames.tolist())
        except (RuntimeError, IndexError) as error:  # it cannot go to the start of most transport streams, say
            raise DecodeError(name, f"torchcodec cannot decode it ({one_line(error)}): decode it with PyAV") from error
        if np.abs(shown.pts_seconds.numpy() - parts.seconds).max() > _SAME_SECONDS:
            raise DecodeError(name, "torchcodec counts its pictures otherwise: decode it with PyAV")
        turned = round((getattr(video.metadata, "rotation", None) or 0) / 90)  # quarters, by torchcodec itself
        images = [_cropped(np.rot90(colours, -turned), parts.geometry, crop) for colours in shown.data.numpy()]
    return DecodedClip(torch.from_numpy(np.stack(images)), torch.from_numpy(parts.audio), start_frame, parts.notes)


def _cropped(
    colours: NDArray[np.uint8],  # [H, W, 3], as stored
    geometry: Geometry,
    crop: Crop,
) -> NDArray[np.uint8]:  # [size, size] luma
    box = crop.box(*geometry.shown_size(*colours.shape[:2]))
    if geometry.aspect == 1:  # the crop first: it is less to convert
        return crop.resize(_luma(geometry.turn(colours)[box]))
    return crop.resize(geometry.show(_luma(colours))[box])


def _luma(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(luma_of(torch.from_numpy(np.ascontiguousarray(colours))).numpy())
