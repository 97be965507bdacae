"""Two timelines on one clock: video at 25 frames a second and audio at 16 kHz, counted from one origin.

Everything is placed by its time stamp, never by its number: decoders return priming and padding with AAC, an audio
stream may start late or early, a cut may keep frames that are not to be shown.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import groupby
from typing import Any, Generic, TypeVar

import av
import numpy as np
from numpy.typing import NDArray

from avppc.clip import SAMPLE_RATE_HZ, VIDEO_FPS

Frame = TypeVar("Frame")
Samples = NDArray[np.int16 | np.float32]

MAX_VIDEO_GAP_SECONDS = 10
MAX_DISTANCE_SECONDS = Fraction(1, 10)  # of a picture from an instant that it stands for
MAX_AUDIO_GAP_SECONDS = 600
MIN_SAMPLE_RATE_HZ = 4_000
MAX_SAMPLE_RATE_HZ = 384_000
_INT16 = {"s16", "s16p"}
_FLOAT32 = {"flt", "fltp"}
_JITTER_SECONDS = 0.0025  # time stamps this far off are taken for rounding: some formats have milliseconds
_JUMP_SECONDS = 0.025  # those further off are believed at once
_SETTLING_FRAMES = 8  # those between the two once so many in a row are off


def converted_rate(fps: float) -> str:
    """The note on a clip whose frames were not 25 a second."""
    return f"frame rate {fps:.4g}: converted to {VIDEO_FPS} by nearest time stamp"


class FrameGrid(Generic[Frame]):
    """Picks for each instant k / 25 s after the origin the frame whose time stamp is nearest (the earlier of two).

    An instant from which the nearest frame is more than 100 ms away gets None: a frame is missing there.
    """

    def __init__(self, time_base: Fraction, origin: int, first: int = 0, *, repeats: bool = False) -> None:
        """Counts from the time stamp `origin`; the first instant asked for is number `first`.

        Args:
            repeats: where a tick of the time base has no frame, the last one is shown again.
        """
        # Positions are integers in units of 1 / (25 den) s: a tick is 25 num of them, a step of the grid den.
        self._tick = VIDEO_FPS * time_base.numerator
        self._step = time_base.denominator
        self._origin = origin
        self._next = first
        self._repeats = repeats
        self._previous: tuple[int, Frame] | None = None
        self._last_gap = 0
        self._frames = 0
        self._start_seconds = 0.0
        self._off_grid = False
        self._longest_held = 0

    @property
    def end_seconds(self) -> float:
        """Time of the last frame seen, from the origin."""
        return 0.0 if self._previous is None else self._previous[0] / (self._step * VIDEO_FPS)

    @property
    def frame_seconds(self) -> float:
        """Mean time from one frame to the next, of the frames seen."""
        return (self.end_seconds - self._start_seconds) / max(self._frames - 1, 1)

    @property
    def end_frame(self) -> int:
        """Number of the instant after the last one that the frames seen cover."""
        if self._previous is None:
            return 0
        return -(-(self._previous[0] + self._last_covered()) // self._step)

    @property
    def notes(self) -> list[str]:
        """What to tell the user where the frames seen were not 25 a second, or one stood for several instants."""
        notes = []
        if self._frames > 1:
            rate = 1 / self.frame_seconds
            if self._off_grid or abs(rate - VIDEO_FPS) >= 0.01:
                notes.append(converted_rate(rate))
        if self._longest_held:
            longest_ms = 1000 * self._longest_held / (self._step * VIDEO_FPS)
            notes.append(f"frames held: until the next one came, up to {longest_ms:.0f} ms")
        return notes

    def push(self, stamp: int, frame: Frame) -> list[Frame | None]:
        """Takes the next frame, a picture or its number; returns the frames of the instants that it settles."""
        settled: list[Frame | None] = []
        position = (stamp - self._origin) * self._tick
        if self._previous is not None:
            before, last = self._previous
            if position <= before:
                raise ValueError(f"damaged: time stamps of the video do not grow after {self.end_seconds:.3f} s")
            if position - before > MAX_VIDEO_GAP_SECONDS * VIDEO_FPS * self._step:
                raise ValueError(
                    f"the video has a gap of more than {MAX_VIDEO_GAP_SECONDS} s at {self.end_seconds:.3f} s"
                )
            gap = position - before
            if self._repeats and gap > self._tick:
                self._longest_held = max(self._longest_held, gap)
                for repeated in range(before + self._tick, position, self._tick):
                    settled += self._take(repeated, last)
        return settled + self._take(position, frame)

    def _take(self, position: int, frame: Frame) -> list[Frame | None]:
        settled = []
        if self._previous is not None:
            self._last_gap = position - self._previous[0]
            while 2 * self._next * self._step <= self._previous[0] + position:
                settled.append(self._nearest())
        else:
            self._start_seconds = position / (self._step * VIDEO_FPS)
        self._previous = (position, frame)
        self._frames += 1
        return settled

    def finish(self) -> list[Frame | None]:
        """Returns the frames of the instants that the last frame covers."""
        settled = []
        while self._previous is not None and self._next * self._step - self._previous[0] < self._last_covered():
            settled.append(self._nearest())
        return settled

    def _last_covered(self) -> int:
        """How long the last frame is shown: as long as the one before it, at least a step of the grid."""
        return max(self._step, min(self._last_gap, int(MAX_DISTANCE_SECONDS * VIDEO_FPS * self._step)))

    def _nearest(self) -> Frame | None:
        assert self._previous is not None
        position, frame = self._previous
        distance = abs(self._next * self._step - position)
        self._next += 1
        self._off_grid |= distance > 0
        if distance > MAX_DISTANCE_SECONDS * VIDEO_FPS * self._step:
            return None
        if distance >= self._step:
            self._longest_held = max(self._longest_held, self._last_gap)
        return frame


class AudioTimeline:
    """Decoded audio of any rate and layout as 16 kHz mono int16; sample n belongs to origin + n / 16000 s.

    Where time stamps leave a hole it is filled with zeros and remembered; where they overlap the earlier sound wins.
    Samples are placed to the nearest 1 / 16000 s. Frames that follow each other without a gap are a stretch, with one
    time for all: stamps that stray from it and come back within a few frames are jitter, others begin a new one.
    """

    def __init__(self, origin_seconds: Fraction, first: int = 0) -> None:
        """Keeps the samples from number `first` on."""
        self.origin_seconds = origin_seconds
        self._chunks: list[Samples] = []
        self._first = first
        self._end = first
        self._holes: list[tuple[int, int]] = []
        self._resampler: av.AudioResampler | None = None
        self._kind: tuple[int, str, str] | None = None
        self._strayed: list[tuple[av.AudioFrame, float]] = []  # frames held back, and by how many seconds they are off
        self._stretch_start = Fraction(0)  # seconds
        self._stretch_rate = 1  # Hz
        self._stretch_samples = 0  # at that rate
        self._write_at = first  # where the stretch's next sample goes

    @property
    def end(self) -> int:
        """Number of the sample after the last one known."""
        return self._end

    def push(self, frame: av.AudioFrame) -> None:
        """Appends a decoded frame; frames come in order of time. One without a time stamp follows the one before it."""
        kind = (frame.sample_rate, frame.layout.name, frame.format.name)
        if kind != self._kind:
            self._settle()
            self._begin_stretch(frame, self._time_of(frame))
            self._kind = kind
        off = self._off_by_seconds(frame)
        if self._strayed and abs(off) > _JUMP_SECONDS:
            self._settle()
            off = self._off_by_seconds(frame)
        if abs(off) <= _JITTER_SECONDS:
            self._append_strayed()
            self._append_frame(frame)
            return
        if self._strayed and (off > 0) != (self._strayed[-1][1] > 0):
            self._append_strayed()  # they come back to the stretch, and beyond
        self._strayed.append((frame, off))
        if abs(off) > _JUMP_SECONDS or len(self._strayed) == _SETTLING_FRAMES:
            self._settle()

    def finish(self) -> None:
        """Appends what is held back: strayed frames, and what is in the resampler."""
        offs = [off for _, off in self._strayed]
        if len(offs) > 1 and max(offs) - min(offs) <= _JITTER_SECONDS:
            self._settle()
        else:  # too few to tell: jitter
            self._append_strayed()
        self._flush()

    def _settle(self) -> None:
        """Begins a stretch with the frames held back, at the time given by the median of their time stamps."""
        if self._strayed:
            first, off = self._strayed[0]
            median = sorted(off for _, off in self._strayed)[len(self._strayed) // 2]
            start = self._time_of(first)
            self._begin_stretch(first, start if median == off else start + Fraction(median - off))
        self._append_strayed()

    def _append_strayed(self) -> None:
        strayed, self._strayed = self._strayed, []
        for frame, _ in strayed:
            self._append_frame(frame)

    def _append_frame(self, frame: av.AudioFrame) -> None:
        """Appends a frame to the stretch."""
        self._stretch_samples += frame.samples
        if self._resampler is not None:
            for converted in self._resampler.resample(frame):
                self._append(converted.to_ndarray()[0])
            return
        dtype: np.dtype[Any] = np.dtype(np.int16 if frame.format.name in _INT16 else np.float32)
        self._append(np.frombuffer(memoryview(frame.planes[0]), dtype, frame.samples).copy())

    def _flush(self) -> None:
        """Appends what the resampler still holds."""
        if self._resampler is not None:
            for converted in self._resampler.resample(None):
                self._append(converted.to_ndarray()[0])
            self._resampler = None

    def take(self, first: int, count: int) -> tuple[NDArray[np.int16], list[tuple[int, int]]]:
        """Samples first to first + count, and the spans [from, to) among them (from `first` on) that hold no sound."""
        data = self._merged()
        start = first - self._first
        assert start >= 0
        samples = data[start : start + count]
        missing = [(max(a, first) - first, min(b, first + count) - first) for a, b in self._holes]
        missing = [(a, b) for a, b in missing if a < b]
        if len(samples) < count:
            missing.append((len(samples), count))
            samples = np.concatenate([samples, np.zeros(count - len(samples), np.int16)])
        return samples, missing

    def drop_before(self, first: int) -> None:
        """Forgets the samples before number `first`."""
        data = self._merged()
        skipped = min(max(first - self._first, 0), len(data))
        self._chunks = [data[skipped:]]
        self._first += skipped
        self._holes = [(a, b) for a, b in self._holes if b > self._first]

    def _time_of(self, frame: av.AudioFrame) -> Fraction:
        """Seconds of a frame's time stamp; without one, of the end of those before it."""
        if frame.pts is not None and frame.time_base is not None:
            return frame.pts * frame.time_base
        if self._kind is None:
            raise ValueError("the audio begins with frames without time stamps")
        return self._stretch_start + Fraction(self._stretch_samples, self._stretch_rate)

    def _off_by_seconds(self, frame: av.AudioFrame) -> float:
        """How far a frame's time stamp is from the end of those before it."""
        if frame.pts is None:
            return self._strayed[-1][1] if self._strayed else 0.0
        samples = self._stretch_samples + sum(strayed.samples for strayed, _ in self._strayed)
        return float(self._time_of(frame) - self._stretch_start) - samples / self._stretch_rate

    def _begin_stretch(self, frame: av.AudioFrame, start: Fraction) -> None:
        if not MIN_SAMPLE_RATE_HZ <= frame.sample_rate <= MAX_SAMPLE_RATE_HZ:
            raise ValueError(
                f"audio of {frame.sample_rate} Hz; {MIN_SAMPLE_RATE_HZ} to {MAX_SAMPLE_RATE_HZ} Hz are allowed"
            )
        self._flush()
        self._stretch_start, self._stretch_samples, self._stretch_rate = start, 0, frame.sample_rate
        self._write_at = round((start - self.origin_seconds) * SAMPLE_RATE_HZ)
        plain = frame.sample_rate == SAMPLE_RATE_HZ and frame.layout.nb_channels == 1
        if not (plain and frame.format.name in _INT16 | _FLOAT32):
            self._resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)

    def _append(self, samples: Samples) -> None:
        start = self._write_at
        self._write_at += len(samples)
        if start > self._end:
            if start - self._end > MAX_AUDIO_GAP_SECONDS * SAMPLE_RATE_HZ:
                raise ValueError(f"the audio has a gap of more than {MAX_AUDIO_GAP_SECONDS} s")
            self._holes.append((self._end, start))
            self._chunks.append(np.zeros(start - self._end, np.int16))
            self._end = start
        fresh = samples[self._end - start :]
        if len(fresh):
            self._chunks.append(fresh)
            self._end += len(fresh)

    def _merged(self) -> NDArray[np.int16]:
        """All samples kept, as one array."""
        alike = groupby(self._chunks, key=lambda chunk: chunk.dtype)
        merged = [_to_int16(np.concatenate(list(chunks))) for _, chunks in alike]
        data = merged[0] if len(merged) == 1 else np.concatenate([np.zeros(0, np.int16), *merged])
        self._chunks = [data]
        return data


def _to_int16(samples: Samples) -> NDArray[np.int16]:
    if samples.dtype == np.int16:
        return samples.astype(np.int16, copy=False)
    scaled = samples * np.float32(32768)
    if not np.isfinite(scaled).all():
        raise ValueError("damaged: the sound holds values that are not finite")
    return np.rint(scaled, out=scaled).clip(-32768, 32767, out=scaled).astype(np.int16)
