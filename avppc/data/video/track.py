"""Follows the mouth through a video, so that the crop stays upright, centred on it and of one size.

A finder tells where a face is in one picture; here its findings become one smooth similarity transform a frame.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import avg_pool2d, grid_sample

from avppc.data.video.crop import geometry_of
from avppc.data.video.pictures import decode_pictures
from avppc.data.video.reader import choose_video
from avppc.data.video.source import DecodeError, Source, damage_as_decode_error, open_video

TRACKER_VERSION = 3  # grows when the same video would be cropped otherwise than before
MAX_GAP_SECONDS = 0.5  # without a face that are bridged
_EDGE_SECONDS = 0.2  # before the first and after the last face that are filled in
_MIN_STRETCH_SECONDS = 0.3  # a face seen for less is a mistake
_CUT_SECONDS = 0.08  # left out after a cut: whatever the frame rate, an instant of 1/25 s falls among them
_SMOOTHING_SECONDS = 0.24  # to each side
_MAX_JUMP = 0.5  # crop sides a mouth moves from one frame to the next, at most
_MAX_ZOOM = 1.4  # factor by which its size changes, at most
_REGION_SIDES = 2.5  # crop sides of the region in which a face is looked for again
_LOST_STRIDE = 5  # when no face was there for a second, one frame of so many is searched
_LOST_FRAMES = 25
_PARTS_STRIDE = 5  # of these, one of so many is searched in parts, too
_MAX_UPSAMPLING = 8

Alive = Callable[[], None]
Square = tuple[float, float, float, float]
"""x, y, a, b: a square of side |(a, b)|, turned by the angle of (a, b), centred on (x, y); pixels, 0 the middle of the
first."""


@dataclass(frozen=True, eq=False)
class Found:
    """A face in a picture."""

    points: NDArray[np.float64]
    """[P, 2] x and y, pixels, of points that do not move with the mouth."""
    mouth: NDArray[np.float64]
    """[2] x and y of the middle of the mouth."""
    region: Square | None = None
    """Where a finder that follows faces looks in the next picture."""
    faces: int = 1
    """How many faces were seen where this one, the largest, was found."""

    def moved(self, x: float, y: float) -> Found:
        """The same face, seen in a picture that has so many pixels more to the left and above."""
        region = None if self.region is None else (self.region[0] + x, self.region[1] + y, *self.region[2:])
        shift = np.array([x, y])
        return replace(self, points=self.points + shift, mouth=self.mouth + shift, region=region)


class FaceFinder(ABC):
    """Finds the largest face of a picture, and follows it from one picture to the next."""

    reference: NDArray[np.float64]
    """[P, 2] where the points of a frontal face lie, in crop sides, in any frame of reference."""

    @abstractmethod
    def find(self, rgb: NDArray[np.uint8]) -> Found | None:
        """The largest face in [H, W, 3], or None."""

    def follow(self, rgb: NDArray[np.uint8], last: Found) -> Found | None:
        """The largest face around where one was found in the picture before, or None."""
        a, b = similarity(self.reference, last.points)
        side = int(_REGION_SIDES * np.hypot(a, b)) + 1
        x, y = (last.points.mean(0) + last.mouth) / 2
        return self.look(rgb, int(x - side / 2), int(y - side / 2), side)

    def look(self, rgb: NDArray[np.uint8], left: int, top: int, side: int) -> Found | None:
        """The largest face in a square part of the picture, which may stick out of it."""
        right, bottom = left + side, top + side
        left, top = max(left, 0), max(top, 0)
        part = rgb[top : max(bottom, 0), left : max(right, 0)]
        if min(part.shape[:2]) < 16:
            return None
        found = self.find(np.ascontiguousarray(part))
        return None if found is None else found.moved(left, top)


@dataclass(frozen=True)
class MouthTrack:
    """The crop of each frame."""

    places: dict[int, Square]
    """By the frame's time stamp; frames without a face are missing."""
    frames: int = 0
    """How many were looked at."""
    seen: int = 0
    """In how many of these a face was found; in others it may have been filled in."""
    faces: int = 1
    """The most faces that were seen in one frame, of those in which the largest was chosen."""

    @property
    def notes(self) -> list[str]:
        """What may be doubted of this track, as "kind: details"."""
        notes = []
        if self.seen < self.frames:
            lost = self.frames - self.seen
            notes.append(f"frames without a face: {lost} of {self.frames}, {lost / self.frames:.1%}")
        if self.faces > 1:
            notes.append(f"several faces: up to {self.faces} at once, the largest is followed")
        return notes

    def warp(self, luma: NDArray[Any], stamp: int, size: int) -> NDArray[np.uint8] | None:
        """The crop of a frame, [size, size] uint8; None where it has no face.

        Bilinear, each pixel the mean of as many samples as it covers pixels across; the border is repeated outside.
        """
        place = self.places.get(stamp)
        if place is None:
            return None
        x, y, a, b = place
        fine = min(_MAX_UPSAMPLING, max(1, round(float(np.hypot(a, b)) / size)))
        steps = (np.arange(size * fine) + 0.5) / (size * fine) - 0.5
        across, down = steps[None, :], steps[:, None]
        height, width = luma.shape
        # grid_sample counts from -1 at the first pixel's outer edge to 1 at the last one's.
        columns = (x + 0.5 + a * across - b * down) * (2 / width) - 1
        rows = (y + 0.5 + b * across + a * down) * (2 / height) - 1
        grid = torch.from_numpy(np.stack([columns, rows], -1).astype(np.float32))[None]
        image = torch.from_numpy(np.ascontiguousarray(luma, np.float32))[None, None]
        warped = avg_pool2d(grid_sample(image, grid, padding_mode="border", align_corners=False), fine)
        return np.asarray(warped[0, 0].round().clamp(0, 255).to(torch.uint8).numpy())


def track_mouth(
    source: Source, finder: FaceFinder, *, until_seconds: float | None = None, alive: Alive = lambda: None
) -> MouthTrack:
    """Follows the mouth through a video; damage ends the track, and is reported where the clips are decoded.

    Args:
        until_seconds: of the video that are looked at; None: all.
        alive: called after each frame.

    Raises:
        DecodeError: there is no face, or none for long enough, in any of these frames.
    """
    search = FaceSearch(finder)
    stamps: list[int] = []
    seconds: list[float] = []
    found: list[Found | None] = []
    name, whole = "", False
    try:
        with damage_as_decode_error(source) as name, open_video(source) as container:
            video = choose_video(container)
            geometry = None
            for frame in decode_pictures(container, video):
                assert frame.pts is not None
                assert frame.time is not None
                if geometry is None:
                    geometry = geometry_of(frame, video.sample_aspect_ratio)
                if until_seconds is not None and seconds and frame.time - seconds[0] > until_seconds:
                    break
                stamps.append(frame.pts)
                seconds.append(frame.time)
                height, width = geometry.square_size(frame.height, frame.width)
                rgb: NDArray[Any] = frame.to_ndarray(format="rgb24", width=width, height=height)
                found.append(search.find(geometry.turn(rgb)))
                alive()
    except DecodeError:
        pass
    else:
        whole = True
    faces = [face for face in found if face is not None]
    places = smooth_track(stamps, np.array(seconds), found, finder.reference)
    if found and not places and whole:
        raise DecodeError(name, f"no face to follow: one was found in {len(faces)} of {len(found)} frames")
    return MouthTrack(places, len(found), len(faces), max((face.faces for face in faces), default=1))


class FaceSearch:
    """Follows the face that was found last; where there is none looks for the largest, in the whole picture and in
    parts of it.

    Detectors expect a face to fill a good part of the picture: a small one is found in a part.
    """

    def __init__(self, finder: FaceFinder) -> None:
        self._finder = finder
        self._last: Found | None = None
        self._lost_for = 0

    def find(self, rgb: NDArray[np.uint8]) -> Found | None:
        """The face in the next picture of the video, [H, W, 3]."""
        found = None
        if self._last is not None:
            found = self._finder.follow(rgb, self._last)
            self._lost_for = 0
        stride = 1 if self._lost_for < _LOST_FRAMES else _LOST_STRIDE
        if found is None and self._lost_for % stride == 0:
            found = self._look_everywhere(rgb, (1,) if self._lost_for % (stride * _PARTS_STRIDE) else (1, 2, 3))
        self._lost_for += 1
        self._last = found
        return found

    def _look_everywhere(self, rgb: NDArray[np.uint8], divisors: tuple[int, ...]) -> Found | None:
        """The largest face in the whole picture, or else in overlapping parts, ever smaller ones."""
        height, width = rgb.shape[:2]
        for divisor in divisors:
            side = max(height, width) if divisor == 1 else max(1, int(1.34 * min(height, width) / divisor))
            places = itertools.product(_starts(width, side), _starts(height, side))
            there = [face for face in (self._finder.look(rgb, *place, side) for place in places) if face is not None]
            if there:
                largest = max(there, key=lambda face: float(np.hypot(*similarity(self._finder.reference, face.points))))
                # It may lie at the edge of a part: look again with the face in the middle.
                found = self._finder.follow(rgb, largest) or largest
                return replace(found, faces=max(face.faces for face in there))
        return None


def _starts(length: int, side: int) -> list[int]:
    """First pixels of parts that cover a length, each overlapping the next by about half."""
    if side >= length:
        return [0]
    count = int(np.ceil(2 * (length - side) / side)) + 1
    return [int(start) for start in np.linspace(0, length - side, count)]


def similarity(reference: NDArray[np.float64], points: NDArray[np.float64]) -> tuple[float, float]:
    """a, b of the turn and zoom [[a, -b], [b, a]] that brings [P, 2] reference to points (but for a shift), by least
    squares."""
    before, after = reference - reference.mean(0), points - points.mean(0)
    power = float((before**2).sum())
    cross = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    return float((before * after).sum()) / power, float(cross.sum()) / power


def smooth_track(
    stamps: list[int],  # [n] time stamps of the frames
    seconds: NDArray[np.float64],  # [n] their times
    found: list[Found | None],
    reference: NDArray[np.float64],
) -> dict[int, Square]:
    """Place of the crop of each frame: stretches of one face, gaps bridged, smoothed by a median and a window.

    Where one stretch ends and another begins (a cut, another face) the first frames of the new one are left out, so
    that no clip goes across.
    """
    seen = [number for number, face in enumerate(found) if face is not None]
    raw = {}
    for number in seen:
        face = found[number]
        assert face is not None
        raw[number] = np.array([*face.mouth, *similarity(reference, face.points)])
    places: dict[int, Square] = {}
    stretches = _stretches(seen, seconds, raw)
    for order, stretch in enumerate(stretches):
        if seconds[stretch[-1]] - seconds[stretch[0]] < _MIN_STRETCH_SECONDS:
            continue
        first = int(np.searchsorted(seconds, seconds[stretch[0]] - _EDGE_SECONDS))
        last = int(np.searchsorted(seconds, seconds[stretch[-1]] + _EDGE_SECONDS, side="right")) - 1
        if order and first <= stretches[order - 1][-1] + 1:
            first = int(np.searchsorted(seconds, seconds[stretch[0]] + _CUT_SECONDS))
        if order + 1 < len(stretches):
            last = min(last, stretches[order + 1][0] - 1)
        numbers = np.arange(first, last + 1)
        values = np.array([raw[number] for number in stretch])  # [frames seen, 4]
        bridged = np.stack([np.interp(seconds[numbers], seconds[stretch], column) for column in values.T], -1)
        smooth = _smooth(bridged, seconds[numbers])
        for number, (x, y, a, b) in zip(numbers.tolist(), smooth.tolist(), strict=True):
            places[stamps[number]] = (x, y, a, b)
    return places


def _stretches(seen: list[int], seconds: NDArray[np.float64], raw: dict[int, NDArray[np.float64]]) -> list[list[int]]:
    """Numbers of the frames with a face, cut where it is away for long, jumps, or changes its size at once."""
    stretches: list[list[int]] = []
    for number in seen:
        if stretches:
            last = stretches[-1][-1]
            before, after = raw[last], raw[number]
            side = float(np.hypot(*before[2:]))
            zoom = float(np.hypot(*after[2:])) / max(side, 1e-6)
            jump = float(np.hypot(*(after[:2] - before[:2]))) / max(side, 1e-6)
            frames_apart = number - last
            near = jump <= _MAX_JUMP * frames_apart and 1 / _MAX_ZOOM <= zoom <= _MAX_ZOOM
            if near and seconds[number] - seconds[last] <= MAX_GAP_SECONDS:
                stretches[-1].append(number)
                continue
        stretches.append([number])
    return stretches


def _smooth(values: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, 4] after a running median of five frames and a straight line through what lies within 0.24 s of each frame,
    weighted by a Hann window: unlike a mean, it does not lag behind a moving mouth where the track begins or ends."""
    count = len(values)
    smooth = np.empty_like(values)
    reach = [min(2, n, count - 1 - n) for n in range(count)]
    medians = np.stack([np.median(values[n - reach[n] : n + reach[n] + 1], axis=0) for n in range(count)])
    for number in range(count):
        low, high = np.searchsorted(seconds, seconds[number] + np.array([-1, 1]) * _SMOOTHING_SECONDS)
        times = seconds[low:high] - seconds[number]
        weights = 1 + np.cos(np.pi * times / (_SMOOTHING_SECONDS + 1e-9))
        lines = np.stack([np.ones_like(times), times], -1)
        scale = np.sqrt(weights)[:, None]
        smooth[number] = np.linalg.lstsq(lines * scale, medians[low:high] * scale, rcond=None)[0][0]
    return smooth
