"""Decodes picture and sound of one file side by side, and keeps what has not been dropped yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import torch
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor

from avppc.clip import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, VIDEO_FPS
from avppc.data.sound_file import sound_notes
from avppc.data.video.clock import AudioTimeline, Frame, FrameGrid
from avppc.data.video.crop import MAX_SIDE_PIXELS, NO_FACE, Crop, LumaReader
from avppc.data.video.pictures import PictureDecoder, decode_packet, ends_stream, frame_grid

Image = NDArray[np.uint8]

MAX_HOURS = 24
LONGER = "longer than the clip"  # begins the note on a video of which only the first frames are used
INTERLACED = "interlaced: every other line of a picture is of another moment, lines are kept as they are"
_PROGRESSIVE = 1  # FFmpeg's number; 0 where the file does not tell, larger ones for interlaced fields
_MAX_PENDING_FRAMES = 400 * VIDEO_FPS  # how far the streams of a file may run apart
_MAX_IDLE_PACKETS = 20_000  # packets in a row without a frame
_MAX_WAITING_AUDIO = 4_000  # packets before the first picture
PRE_ROLL_SECONDS = Fraction(3, 10)  # audio decoders need a few packets to settle
_DECLARED_TOLERANCE_SECONDS = Fraction(1, 5)
SEVERAL_VIDEOS = "several video streams"  # begins a note
_MAX_HOLE_SAMPLES = SAMPLES_PER_FRAME  # inside a clip; more means lost packets
_CODEC_OPTIONS = {
    "err_detect": "explode",  # report damage instead of painting over it
    "max_pixels": str(MAX_SIDE_PIXELS * MAX_SIDE_PIXELS // 2),
}


@dataclass(frozen=True, eq=False)
class DecodedClip:
    """Picture and sound of one span of a video."""

    video: Tensor
    """[T, size, size] uint8 luma, 16 black to 235 white, 25 frames a second."""
    audio: Tensor
    """[640 T] int16 mono at 16 kHz; sample n belongs to the first frame's time + n / 16000 s."""
    start_frame: int
    """Where the clip starts in the video, in frames of 1/25 s."""
    notes: tuple[str, ...]
    """What was converted or filled in, as "kind: details"."""


class ClipError(ValueError):
    """This clip cannot be used, but the video's other clips may be."""


class StreamReader:
    """Decodes both streams of a file side by side, keeping crops and samples until they are dropped.

    Args:
        needs_sound: else a video without sound is as good, and so is one whose sound has holes or ends early: there is
            silence then.
    """

    def __init__(
        self,
        container: InputContainer,
        crop: Crop,
        first_frame: int,
        seek: bool,
        notes: Sequence[str] = (),
        *,
        needs_sound: bool = True,
    ) -> None:
        self._container = container
        self._needs_sound = needs_sound
        self._video = choose_video(container)
        self._audio = choose_sound(container) if needs_sound or has_sound(container) else None
        self._pictures = PictureDecoder(container, self._video)
        self._luma = LumaReader(crop, self._video.sample_aspect_ratio)
        self._grid: FrameGrid[Image] | None = None
        self._sound: AudioTimeline | None = None
        self._waiting_audio: list[av.AudioFrame] = []
        self._images: list[Image | None] = []
        self.first_frame = first_frame  # number of the first image kept
        self._video_done = False
        self._audio_done = self._audio is None
        self._idle_packets = 0
        self._notes = [*notes, *stream_notes(container, self._video, self._audio)]
        if seek:
            self._seek(first_frame)
        self._packets = container.demux(*filter(None, (self._video, self._audio)))

    @property
    def end_frame(self) -> int:
        """Number of the frame after the last one known."""
        return self.first_frame + len(self._images)

    @property
    def total_frames(self) -> int:
        """Frames of 1/25 s from the first picture to the last one decoded."""
        return 0 if self._grid is None else self._grid.end_frame

    def fill(self, end_frame: int) -> bool:
        """Decodes until frames and samples up to end_frame are there; False where the video ends before."""
        limit = end_frame - self.first_frame + _MAX_PENDING_FRAMES
        while self._wants_video(end_frame) or self._wants_audio(end_frame):
            if len(self._images) > limit:
                raise ValueError("picture and sound lie too far apart in the file")
            self._step()
        return self.end_frame >= end_frame

    def _wants_video(self, end_frame: int) -> bool:
        return not self._video_done and self.end_frame < end_frame

    def _wants_audio(self, end_frame: int) -> bool:
        return not self._audio_done and (self._sound is None or self._sound.end < end_frame * SAMPLES_PER_FRAME)

    def note_length(self, end_frame: int) -> None:
        """Adds a note where the file declares a longer video than the frames up to `end_frame`."""
        duration = seconds_of(self._video, self._video.duration)
        if duration is not None and duration * VIDEO_FPS > end_frame + 1:
            used = end_frame / VIDEO_FPS
            self._notes.append(f"{LONGER}: {float(duration):.2f} s, up to {used:.2f} s are used")

    def clip(self, start: int, count: int) -> DecodedClip:
        """Frames start to start + count with their sound."""
        assert self._sound is not None
        assert self._grid is not None
        present = all_present(self._images[start - self.first_frame :][:count], start)
        faceless = [number for number, image in enumerate(present, start) if image is NO_FACE]
        if faceless:
            seconds = faceless[0] / VIDEO_FPS
            raise ClipError(f"no face to follow: in {len(faceless)} of {count} frames, the first at {seconds:.2f} s")
        samples, missing = self._sound.take(start * SAMPLES_PER_FRAME, count * SAMPLES_PER_FRAME)
        silent = missing_sound(missing, len(samples)) if self._needs_sound else []
        notes = [*self._notes, *self._luma.notes, *silent, *self._grid.notes]
        return DecodedClip(
            torch.from_numpy(np.stack(present)), torch.from_numpy(np.array(samples)), start, tuple(notes)
        )

    def drop_before(self, frame: int) -> None:
        """Forgets what lies before a frame."""
        dropped = min(max(frame - self.first_frame, 0), len(self._images))
        del self._images[:dropped]
        self.first_frame += dropped
        if self._sound is not None:
            self._sound.drop_before(frame * SAMPLES_PER_FRAME)

    def check_declared_end(self) -> None:
        """Refuses a video that ends well before the file says it does."""
        duration = seconds_of(self._video, self._video.duration)
        if self._grid is None or duration is None:
            return
        end = self._grid.end_seconds + self._grid.frame_seconds
        if end < float(duration) - max(float(_DECLARED_TOLERANCE_SECONDS), 2 * self._grid.frame_seconds):
            raise ValueError(f"truncated: the video ends at {end:.2f} s, the file declares {float(duration):.2f} s")

    def _step(self) -> None:
        """Decodes one packet; a stream's last packet is empty and makes its decoder give what it still holds."""
        packet = next(self._packets, None)
        if packet is None:
            self._end_video()
            self._end_audio()
            return
        if packet.is_corrupt:
            raise ValueError("damaged: a packet")
        frames: Sequence[av.VideoFrame | av.AudioFrame]
        frames = self._pictures.decode(packet) if packet.stream is self._video else decode_packet(packet)
        self._idle_packets = 0 if frames else self._idle_packets + 1
        if self._idle_packets > _MAX_IDLE_PACKETS:
            raise ValueError(f"damaged: {_MAX_IDLE_PACKETS} packets in a row give no frame")
        for frame in frames:
            if frame.is_corrupt:
                raise ValueError("damaged: a frame" + ("" if frame.time is None else f" at {frame.time:.2f} s"))
            if isinstance(frame, av.VideoFrame):
                self._push_video(frame)
            else:
                self._push_audio(frame)
        if ends_stream(packet):
            if packet.stream is self._video:
                self._end_video()
            else:
                self._end_audio()

    def _push_video(self, frame: av.VideoFrame) -> None:
        if self._grid is None:
            self._grid = self._start_clock(frame)
        if frame.interlaced_frame and INTERLACED not in self._notes:
            self._notes.append(INTERLACED)
        assert frame.pts is not None
        self._images += self._grid.push(frame.pts, self._luma.read(frame))

    def _push_audio(self, frame: av.AudioFrame) -> None:
        if self._sound is None:  # the clock starts with the first picture
            self._waiting_audio.append(frame)
            if len(self._waiting_audio) > _MAX_WAITING_AUDIO:
                raise ValueError("picture and sound lie too far apart in the file")
        else:
            self._sound.push(frame)

    def _start_clock(self, frame: av.VideoFrame) -> FrameGrid[Image]:
        """Begins both timelines, of picture and sound, at the first picture."""
        origin, time_base = frame.pts, frame.time_base
        if origin is None or time_base is None:
            raise ValueError("the video has frames without time stamps")
        self._sound = AudioTimeline(origin * time_base, self.first_frame * SAMPLES_PER_FRAME)
        for sound in self._waiting_audio:
            self._sound.push(sound)
        self._waiting_audio.clear()
        if self._audio_done:
            self._sound.finish()
        return frame_grid(self._container, time_base, origin, self.first_frame)

    def _seek(self, first_frame: int) -> None:
        """Starts the clock with the first picture, then jumps to the key frame before first_frame."""
        frame = next(self._container.decode(self._video))
        assert isinstance(frame, av.VideoFrame)
        self._grid = self._start_clock(frame)
        assert self._sound is not None
        target = self._sound.origin_seconds + Fraction(first_frame, VIDEO_FPS) - PRE_ROLL_SECONDS
        self._container.seek(int(target * av.time_base), backward=True)

    def _end_video(self) -> None:
        if not self._video_done:
            self._video_done = True
            if self._grid is not None:
                self._images += self._grid.finish()

    def _end_audio(self) -> None:
        if self._audio_done:
            return
        self._audio_done = True
        if self._sound is None:
            return
        self._sound.finish()
        if self._audio is None or not self._needs_sound:
            return
        end = Fraction(self._sound.end, SAMPLE_RATE_HZ) + self._sound.origin_seconds
        declared = seconds_of(self._audio, self._audio.duration)
        if declared is None or self._audio.start_time is None:
            return
        declared += seconds_of(self._audio, self._audio.start_time) or 0
        if end < declared - _DECLARED_TOLERANCE_SECONDS:
            raise ValueError(
                f"truncated: the sound ends at {float(end):.2f} s, the file declares {float(declared):.2f} s"
            )


def _find_video(container: InputContainer) -> VideoStream | None:
    """The stream that FFmpeg would take, too; no cover picture, nor a thumbnail that is not marked as one."""
    attached = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & attached]
    films = [stream for stream in streams if stream.frames != 1] or streams  # 0 where the file does not tell
    best = container.streams.best("video")
    return next((stream for stream in films if stream is best), films[0] if films else None)


def choose_streams(container: InputContainer) -> tuple[VideoStream, AudioStream]:
    """The video stream that holds the film and the default audio stream, ready to decode."""
    return choose_video(container), choose_sound(container)


def choose_video(container: InputContainer) -> VideoStream:
    """The video stream that holds the film, ready to decode."""
    video = _find_video(container)
    if video is None:
        raise ValueError("no video stream")
    _set_up("video", video)
    width, height = video.codec_context.width, video.codec_context.height
    if not (0 < width <= MAX_SIDE_PIXELS and 0 < height <= MAX_SIDE_PIXELS):
        raise ValueError(f"frames of {width} x {height}, at most {MAX_SIDE_PIXELS} pixels a side are allowed")
    return video


def choose_sound(container: InputContainer) -> AudioStream:
    """The default audio stream, ready to decode."""
    audio = choose_audio(container)
    if audio is None:
        raise ValueError("no audio stream")
    _set_up("audio", audio)
    return audio


def has_sound(container: InputContainer) -> bool:
    """Whether there is an audio stream with a decoder."""
    audio = choose_audio(container)
    return audio is not None and audio.codec_context is not None


def _set_up(kind: str, stream: VideoStream | AudioStream) -> None:
    if stream.codec_context is None:
        raise ValueError(f"no decoder for the {kind} stream")
    duration = seconds_of(stream, stream.duration)
    if duration is not None and not 0 <= duration <= MAX_HOURS * 3600:
        raise ValueError(f"the {kind} declares a length of {float(duration):.0f} s, {MAX_HOURS} h are allowed")
    # Clips are short and files many: threads cost more than they bring, and processes share the work better.
    stream.codec_context.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    stream.codec_context.options = _CODEC_OPTIONS


def choose_audio(container: InputContainer) -> AudioStream | None:
    """The audio stream that the file marks as its default one, else the first."""
    streams = container.streams.audio
    default = av.stream.Disposition.default
    return next((stream for stream in streams if stream.disposition & default), next(iter(streams), None))


def stream_notes(container: InputContainer, video: VideoStream, audio: AudioStream | None) -> list[str]:
    """Notes where there were several streams to choose from, the sound is another file's, the video is interlaced."""
    disposition = av.stream.Disposition
    videos = [stream.index for stream in container.streams.video if not stream.disposition & disposition.attached_pic]
    sounds = [stream.index for stream in container.streams.audio]
    notes = []
    for kind, stream, indices in ((SEVERAL_VIDEOS, video, videos), ("several sound tracks", audio, sounds)):
        if stream is not None and len(indices) > 1:
            default = ", the file's default," if stream.disposition & disposition.default else ""
            notes.append(f"{kind}: number {indices.index(stream.index) + 1} of {len(indices)}{default} is used")
    interlaced = [INTERLACED] if video.codec_context.field_order > _PROGRESSIVE else []
    return [*notes, *([] if audio is None else sound_notes(video, audio)), *interlaced]


def seconds_of(stream: VideoStream | AudioStream, ticks: int | None) -> Fraction | None:
    """So many ticks of a stream's time base in seconds; None where the file tells one of the two not."""
    return None if ticks is None or stream.time_base is None else ticks * stream.time_base


def all_present(frames: Sequence[Frame | None], start: int) -> list[Frame]:
    """The frames of a clip, of which the first is number `start` of the video; ClipError where one is missing."""
    present = [frame for frame in frames if frame is not None]
    if len(present) < len(frames):
        seconds = (start + next(place for place, frame in enumerate(frames) if frame is None)) / VIDEO_FPS
        missing = f"{len(frames) - len(present)} of {len(frames)}"
        raise ClipError(f"frames missing: {missing}, the first at {seconds:.2f} s")
    return present


def missing_sound(missing: list[tuple[int, int]], count: int) -> list[str]:
    """Notes on the zeros at the edges of a clip; ClipError where sound is missing inside it or for most of it."""
    notes = []
    inside = 0  # several small holes are one large one: a clock that is wrong leaves them at regular distances
    for first, last in missing:
        first_ms, last_ms = (1000 * sample // SAMPLE_RATE_HZ for sample in (first, last))
        inside += last - first if first > 0 and last < count else 0
        if inside > _MAX_HOLE_SAMPLES:
            raise ClipError(f"sound missing: {first_ms} to {last_ms} ms of the clip")
        notes.append(f"sound padded with zeros: {first_ms} to {last_ms} ms of the clip")
    total = sum(last - first for first, last in missing)
    if 2 * total > count:
        present_ms, all_ms = (1000 * samples // SAMPLE_RATE_HZ for samples in (count - total, count))
        raise ClipError(f"sound missing: only {present_ms} of {all_ms} ms")
    return notes
