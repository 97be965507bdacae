"""Two timelines on one clock: video at 25 frames a second and audio at 16 kHz, counted from one origin.

Everything is placed by its time stamp, never by its number: decoders return priming and padding with AAC, an audio
stream may start late or early, a cut may keep frames that are not to be shown.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import groupby
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from avppc.clip import SAMPLE_RATE_HZ, VIDEO_FPS

Image = NDArray[np.uint8]
Samples = NDArray[np.int16 | np.float32]

MAX_VIDEO_GAP_SECONDS = 10
MAX_AUDIO_GAP_SECONDS = 600
MIN_SAMPLE_RATE_HZ = 4_000
MAX_SAMPLE_RATE_HZ = 384_000
_INT16 = {"s16", "s16p"}
_FLOAT32 = {"flt", "fltp"}
_STAMP_TOLERANCE_SECONDS = 0.025  # some formats round time stamps to milliseconds, or to whole packets


def converted_rate(fps: float) -> str:
    """The note on a clip whose frames were not 25 a second."""
    return f"frame rate {fps:.4g}: converted to {VIDEO_FPS} by nearest time stamp"


class FrameGrid:
    """Picks for each instant k / 25 s after the origin the frame whose time stamp is nearest (the earlier of two).

    An instant from which the nearest frame is 40 ms or more away gets None: a frame is missing there.
    """

    def __init__(self, time_base: Fraction, origin: int, first: int = 0) -> None:
        """Counts from the time stamp `origin`; the first instant asked for is number `first`."""
        # Positions are integers in units of 1 / (25 den) s: a tick is 25 num of them, a step of the grid den.
        self._tick = VIDEO_FPS * time_base.numerator
        self._step = time_base.denominator
        self._origin = origin
        self._next = first
        self._previous: tuple[int, Image] | None = None
        self._frames = 0
        self._start_seconds = 0.0
        self._off_grid = False

    @property
    def end_seconds(self) -> float:
        """Time of the last frame seen, from the origin."""
        return 0.0 if self._previous is None else self._previous[0] / (self._step * VIDEO_FPS)

    @property
    def frame_seconds(self) -> float:
        """Mean time from one frame to the next, of the frames seen."""
        return (self.end_seconds - self._start_seconds) / max(self._frames - 1, 1)

    @property
    def rate_note(self) -> str | None:
        """What to tell the user where the frames seen were not 25 a second; None where they were."""
        if self._frames < 2:
            return None
        rate = 1 / self.frame_seconds
        if not self._off_grid and abs(rate - VIDEO_FPS) < 0.01:
            return None
        return converted_rate(rate)

    def push(self, stamp: int, image: Image) -> list[Image | None]:
        """Takes the next frame; returns the images of the instants that it settles."""
        settled: list[Image | None] = []
        position = (stamp - self._origin) * self._tick
        if self._previous is not None:
            if position <= self._previous[0]:
                raise ValueError(f"damaged: time stamps of the video do not grow after {self.end_seconds:.3f} s")
            if position - self._previous[0] > MAX_VIDEO_GAP_SECONDS * VIDEO_FPS * self._step:
                raise ValueError(
                    f"the video has a gap of more than {MAX_VIDEO_GAP_SECONDS} s at {self.end_seconds:.3f} s"
                )
            while 2 * self._next * self._step <= self._previous[0] + position:
                settled.append(self._nearest())
        else:
            self._start_seconds = position / (self._step * VIDEO_FPS)
        self._previous = (position, image)
        self._frames += 1
        return settled

    def finish(self) -> list[Image | None]:
        """Returns the images of the instants that the last frame covers."""
        settled = []
        while self._previous is not None and self._next * self._step - self._previous[0] < self._step:
            settled.append(self._nearest())
        return settled

    def _nearest(self) -> Image | None:
        assert self._previous is not None
        position, image = self._previous
        distance = abs(self._next * self._step - position)
        self._next += 1
        self._off_grid |= distance > 0
        return image if distance < self._step else None


class AudioTimeline:
    """Decoded audio of any rate and layout as 16 kHz mono int16; sample n belongs to origin + n / 16000 s.

    Where time stamps leave a hole it is filled with zeros and remembered; where they overlap the earlier sound wins.
    Samples are placed to the nearest 1 / 16000 s.
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
        self._run_pts = 0  # frames that follow each other without a gap are a run
        self._run_tick_seconds = 0.0
        self._run_rate = 1  # Hz
        self._run_samples = 0  # at that rate
        self._write_at = first  # where the run's next sample goes

    @property
    def end(self) -> int:
        """Number of the sample after the last one known."""
        return self._end

    def push(self, frame: av.AudioFrame) -> None:
        """Appends a decoded frame; frames come in order of time."""
        if frame.pts is None:
            raise ValueError("the audio has frames without time stamps")
        kind = (frame.sample_rate, frame.layout.name, frame.format.name)
        if kind != self._kind or self._off_by_seconds(frame.pts) > _STAMP_TOLERANCE_SECONDS:
            self._begin_run(frame, frame.pts)
            self._kind = kind
        self._run_samples += frame.samples
        if self._resampler is not None:
            for converted in self._resampler.resample(frame):
                self._append(converted.to_ndarray()[0])
            return
        dtype: np.dtype[Any] = np.dtype(np.int16 if kind[2] in _INT16 else np.float32)
        self._append(np.frombuffer(memoryview(frame.planes[0]), dtype, frame.samples).copy())

    def finish(self) -> None:
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

    def _off_by_seconds(self, pts: int) -> float:
        """How far a frame's time stamp is from the end of those before it."""
        return abs((pts - self._run_pts) * self._run_tick_seconds - self._run_samples / self._run_rate)

    def _begin_run(self, frame: av.AudioFrame, pts: int) -> None:
        time_base = frame.time_base
        if time_base is None:
            raise ValueError("the audio has frames without time stamps")
        if not MIN_SAMPLE_RATE_HZ <= frame.sample_rate <= MAX_SAMPLE_RATE_HZ:
            raise ValueError(
                f"audio of {frame.sample_rate} Hz; {MIN_SAMPLE_RATE_HZ} to {MAX_SAMPLE_RATE_HZ} Hz are allowed"
            )
        self.finish()
        self._run_pts, self._run_samples = pts, 0
        self._run_tick_seconds, self._run_rate = float(time_base), frame.sample_rate
        self._write_at = round((pts * time_base - self.origin_seconds) * SAMPLE_RATE_HZ)
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
