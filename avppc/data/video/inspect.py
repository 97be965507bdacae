"""Facts of a video file without decoding it, as ffprobe gives them: streams, times, rates, key frames, problems."""

from __future__ import annotations

import itertools
import os
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream
from av.video.stream import VideoStream

from avppc.clip import CLIP_FRAMES, VIDEO_FPS
from avppc.data.video.clock import MAX_DISTANCE_SECONDS, converted_rate
from avppc.data.video.crop import geometry_of
from avppc.data.video.pictures import HIDDEN_FRAMES, PacketClock, PictureDecoder, shows_again
from avppc.data.video.reader import choose_streams, stream_notes
from avppc.data.video.source import Source, check_container, damage_as_decode_error, open_video

_RATE_TOLERANCE = 0.001  # of 25 frames a second: below, nothing is converted
_JITTER_TOLERANCE_SECONDS = 0.002  # container formats round time stamps to milliseconds
_MAX_START_DIFFERENCE_SECONDS = 0.1
_FEW_PACKETS = 100_000  # so many, some 400 bytes each, are read of any file
_TOO_SHORT = "too short"
_HOLE_SECONDS = 2 * MAX_DISTANCE_SECONDS  # an instant between two frames further apart may have no picture near
_EVEN_SECONDS = 2 / VIDEO_FPS  # frames so far apart do not count for the rate


@dataclass
class VideoFacts:
    """What `avppc index` writes into a video's line of the manifest."""

    duration_seconds: float = 0.0
    """Of the picture: from the first time stamp to the end of the last frame."""
    fps: float = 0.0
    """Mean frame rate."""
    frames: int = 0
    width: int = 0
    """Pixels, as stored."""
    height: int = 0
    """Pixels, as stored."""
    video_codec: str = ""
    pixel_format: str = ""
    key_frames: int = 0
    video_start_seconds: float = 0.0
    """Time stamp of the first picture."""
    audio_codec: str = ""
    sample_rate_hz: int = 0
    channels: int = 0
    audio_start_seconds: float = 0.0
    """Time stamp of the first sound packet; AAC's priming counts."""
    audio_seconds: float = 0.0
    streams: dict[str, int] = field(default_factory=dict)
    """How many streams of each kind the file has."""
    notes: list[str] = field(default_factory=list)
    """What will be converted."""
    problems: list[str] = field(default_factory=list)
    """What makes the file, or clips of it, unusable."""

    @property
    def usable(self) -> bool:
        """Whether the file gives a clip at all, as far as can be told without decoding."""
        return not any(problem.startswith(_TOO_SHORT) for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        """The facts as JSON values; seconds are rounded to microseconds."""
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}


def inspect_video(source: Source, num_frames: int = CLIP_FRAMES) -> VideoFacts:
    """Facts of a file, read from its headers and packets.

    Args:
        num_frames: frames of 1/25 s a clip needs; shorter videos are a problem.

    Raises:
        DecodeError: not a video, damaged where a reader notices without decoding, without sound or picture.
    """
    facts = VideoFacts()
    with damage_as_decode_error(source), open_video(source) as container:
        facts.notes += check_container(source)
        for stream in container.streams:
            facts.streams[stream.type] = facts.streams.get(stream.type, 0) + 1
        video, audio = choose_streams(container)
        facts.width, facts.height = video.codec_context.width, video.codec_context.height
        facts.video_codec, facts.pixel_format = video.codec_context.name, video.codec_context.pix_fmt or ""
        facts.audio_codec, facts.channels = audio.codec_context.name, audio.codec_context.channels
        facts.sample_rate_hz = audio.codec_context.sample_rate or 0
        facts.notes += stream_notes(container, video, audio)
        times: dict[Stream, list[tuple[Fraction, Fraction]]] = {video: [], audio: []}
        unstamped = 0  # pictures
        clock, first = PacketClock(), _FirstPicture(container, video)
        most = max(_size(source), _FEW_PACKETS)
        for number, packet in enumerate(container.demux(video, audio)):
            if number > most:
                raise ValueError(f"damaged: it has more packets than bytes, {most:,}")
            if packet.stream is video:
                first.look_for(packet)
            stamp = clock.stamp(packet) if packet.stream is video else packet.pts
            if packet.time_base is None or not packet.size:
                continue
            if stamp is None:
                unstamped += packet.stream is video
                continue
            if packet.is_discard:  # before the start of an edit list
                if packet.stream is video:
                    _add(facts.notes, f"{HIDDEN_FRAMES}: an edit list leaves some out")
                continue
            facts.key_frames += packet.is_keyframe and packet.stream is video
            if packet.is_corrupt:
                _add(facts.problems, "damaged: a packet")
            span = (stamp * packet.time_base, (packet.duration or 0) * packet.time_base)
            times[packet.stream].append(span)
        facts.notes += first.notes
        held = video.time_base is not None and shows_again(container, video.time_base)
        _read_times(facts, _filled(sorted(times[video]), unstamped), sorted(times[audio]), held)
    _add_notes(facts, num_frames)
    return facts


def _size(source: Source) -> int:
    return len(source) if isinstance(source, bytes) else os.stat(source).st_size


class _FirstPicture:
    """Decodes a stream as far as its first picture: only that tells how all are to be shown."""

    def __init__(self, container: InputContainer, video: VideoStream) -> None:
        self.notes: list[str] = []
        self._video = video
        self._decoder: PictureDecoder | None = PictureDecoder(container, video)

    def look_for(self, packet: Packet[Any]) -> None:
        """Takes the next packet of the stream."""
        if self._decoder is None:
            return
        try:
            frames = self._decoder.decode(packet)
        except av.FFmpegError:
            self._decoder = None  # whoever decodes the video will be told
            return
        if frames:
            self.notes = geometry_of(frames[0], self._video.sample_aspect_ratio).notes
            self._decoder = None


def _filled(
    spans: list[tuple[Fraction, Fraction]],  # time stamp and duration of each picture, seconds, in order
    unstamped: int,
) -> list[tuple[Fraction, Fraction]]:
    """Puts pictures without time stamp among the others: as many as fit where there is a gap, the rest at the end."""
    filled: list[tuple[Fraction, Fraction]] = []
    for place, (stamp, duration) in enumerate(spans):
        filled.append((stamp, duration))
        following = spans[place + 1][0] if place + 1 < len(spans) else None
        while unstamped and duration and (following is None or filled[-1][0] + duration * Fraction(3, 2) < following):
            filled.append((filled[-1][0] + duration, duration))
            unstamped -= 1
    return filled


def _read_times(
    facts: VideoFacts,
    video: list[tuple[Fraction, Fraction]],  # time stamp and duration of each packet, seconds
    audio: list[tuple[Fraction, Fraction]],
    held: bool,  # whether each picture lasts until the next one, however long
) -> None:
    if not video:
        raise ValueError("the video stream has no pictures")
    if not audio:
        raise ValueError("the audio stream has no sound")
    stamps = [stamp for stamp, _ in video]
    facts.frames = len(stamps)
    facts.video_start_seconds, facts.audio_start_seconds = float(stamps[0]), float(audio[0][0])
    facts.audio_seconds = float(audio[-1][0] + audio[-1][1] - audio[0][0])
    span = stamps[-1] - stamps[0]
    exact = [after - before for before, after in itertools.pairwise(stamps)] or [video[-1][1]]
    steps = [float(step) for step in exact]
    usual = [step for step in steps if step < _EVEN_SECONDS] or steps
    mean = sum(usual) / len(usual)
    facts.fps = 1 / mean if mean > 0 else 0.0
    facts.duration_seconds = float(span) + (float(video[-1][1]) or mean)
    if max(steps) - min(steps) > 2 * _JITTER_TOLERANCE_SECONDS:
        _add(facts.notes, f"uneven frames: {1000 * min(steps):.0f} to {1000 * max(steps):.0f} ms apart")
    holes = sum(step > _HOLE_SECONDS for step in exact)
    if holes and not held:
        _add(facts.problems, f"frames missing: at {holes} places")


def _add_notes(facts: VideoFacts, num_frames: int) -> None:
    """Adds what will be converted to the notes, and a video too short for a clip to the problems."""
    if abs(facts.fps / VIDEO_FPS - 1) > _RATE_TOLERANCE:
        _add(facts.notes, converted_rate(facts.fps))
    if facts.duration_seconds * VIDEO_FPS < num_frames - 0.5:
        _add(facts.problems, f"{_TOO_SHORT}: {facts.duration_seconds:.2f} s, {num_frames / VIDEO_FPS:.2f} s are needed")
    late = facts.audio_start_seconds - facts.video_start_seconds
    if abs(late) > _MAX_START_DIFFERENCE_SECONDS:
        _add(facts.notes, f"sound starts {'late' if late > 0 else 'early'}: by {abs(late):.3f} s")
    missing = facts.duration_seconds - max(late, 0) - (facts.audio_seconds + min(late, 0))
    if missing > _MAX_START_DIFFERENCE_SECONDS:
        _add(facts.notes, f"sound ends early: {missing:.2f} s before the picture")


def _add(texts: list[str], text: str) -> None:
    if text not in texts:
        texts.append(text)
